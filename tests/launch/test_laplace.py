"""The example of jobs that are parallel themselves: the digits do not depend on the ranks, and the error is the grid's."""

from __future__ import annotations

from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "laplace.py"


def test_laplace(launch):
    sizes = {0: 1, 5: 2, 4: 3}
    ended = {size: launch(size, EXAMPLE, "--ranks", ranks).wait(60) for size, ranks in sizes.items()}
    for one in ended.values():
        assert (one.code, one.err) == (0, ""), one
        assert one.out == ended[0].out
    errors = [float(line.split()[-1]) for line in ended[0].out.splitlines()]
    assert len(errors) == 6
    assert 1e-5 < errors[0] < 1e-3  # of a grid of 40 points: the square of its width, more or less
    assert errors == sorted(errors)
