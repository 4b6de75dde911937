"""The sunspot example: its numbers are right, and the same bit for bit on any number of ranks.

Run it with `mpiexec -n 1`, 2 and 4: each compares the run on all ranks with one in the master's process alone, so the
sizes are compared with each other too. No number is written down here to all its digits: another CPU may round the
matrix products otherwise.
"""
from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sunspots.py"
RESAMPLINGS, BLOCK = 2000, 64  # the last block is a short one


def load_example() -> ModuleType:
    """Import the example by its path: examples/ is no package."""
    spec = importlib.util.spec_from_file_location("sunspots_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sunspots = load_example()
YEARS, VALUES = np.loadtxt(sunspots.DATA, delimiter=",", skiprows=1, unpack=True)


@pytest.fixture(scope="module")
def local():
    """The bootstrap in this process alone: the sweep, which still has all its results, and the answer."""
    sweep = sunspots.Sunspots(YEARS, VALUES, RESAMPLINGS, BLOCK, vm=None)
    return sweep, sweep.run()


@pytest.fixture(scope="module")
def world():
    """All ranks that mpiexec started."""
    return pytest.importorskip("mpi4py.MPI").COMM_WORLD


@pytest.mark.mpi
def test_same_bits_on_all_ranks_and_on_one(world, local):
    sweep = sunspots.Sunspots(YEARS, VALUES, RESAMPLINGS, BLOCK, vm=world)
    answer = sweep.run()
    if world.rank > 0:
        assert answer is None
        return
    alone, expected = local
    assert sweep.highest.tobytes() == alone.highest.tobytes()
    assert answer.power.tobytes() == expected.power.tobytes()
    assert answer[1:] == expected[1:]
    assert str(answer) == str(expected)


@pytest.mark.mpi
def test_script_prints_two_lines_on_the_master(world, local, monkeypatch, capsys):
    options = ["--resamplings", str(RESAMPLINGS), "--block", str(BLOCK), "--picture", "", "--quiet"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    sunspots.main()
    printed = capsys.readouterr()
    assert printed.out == (f"{local[1]}\n" if world.rank == 0 else "")
    assert printed.err == ""


def test_data():
    assert np.array_equal(YEARS, np.arange(1700, 2009))
    assert VALUES[[0, -1]].tolist() == [5.0, 2.9]


def test_peak_is_the_solar_cycle(local):
    answer = local[1]
    assert 10.5 < answer.peak_period < 11.5
    assert answer.peak_power == answer.power.max() > 2 * answer.level
    assert answer.reached == 0
    first, second = str(answer).splitlines()
    assert first == "peak: 11.0 years, normalised power 42.4"  # as scipy.signal.lombscargle has it
    assert second.startswith("false-alarm probability below 0.0005 (0 of 2000 shuffled series); 99.9 % line at power ")


def test_periodogram_is_a_least_squares_fit():
    # Lomb (1976): 2 P(f) is what a fitted sine wave of frequency f takes off the sum of squares. lstsq knows no tau.
    rng = np.random.default_rng(1)
    times = np.sort(rng.uniform(0, 50, 80))
    series = np.sin(2 * np.pi * 0.21 * times) + rng.normal(size=80)
    series = (series - series.mean()) / series.std(ddof=1)
    frequencies = np.linspace(0.01, 1, 37)
    power = sunspots.Periodogram(times, frequencies)(series[np.newaxis])[0]
    for frequency, found in zip(frequencies, power, strict=True):
        angle = 2 * np.pi * frequency * times
        wave = np.stack((np.cos(angle), np.sin(angle)), axis=1)
        rest = series - wave @ np.linalg.lstsq(wave, series)[0]
        assert found == pytest.approx((series @ series - rest @ rest) / 2, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("share", "slack"), [(0.5, 0), (0.9, 0), (0.99, 0), (sunspots.CONFIDENCE, 1.6)])
def test_false_alarm_levels_lie_between_the_analytical_ones(local, share, slack):
    # One power of n white values, in units of their own variance, is a beta variable: it exceeds z with probability
    # q = (1 - 2z/(n-1))^((n-3)/2). The highest of m independent ones stays below z with probability (1 - q)^m. n years
    # have about n/2 independent frequencies, and no more than were looked at. Only two of 2000 series lie above the
    # 99.9 % line: the slack there is two standard errors.
    n = YEARS.size

    def level(m: float) -> float:
        return (n - 1) / 2 * (1 - (1 - share ** (1 / m)) ** (2 / (n - 3)))

    found = np.quantile(local[0].highest.ravel()[:RESAMPLINGS], share, method="higher")
    assert level(n / 2) - slack < found < level(sunspots.FREQUENCIES.size) + slack
    if share == sunspots.CONFIDENCE:
        assert local[1].level == found


def test_numbers_belong_to_the_resampling(local):
    highest = local[0].highest.ravel()
    other_blocks = sunspots.Sunspots(YEARS, VALUES, 100, 7)
    other_blocks.run()
    # Not bit for bit: a matrix product of another shape may round otherwise.
    assert np.allclose(other_blocks.highest.ravel()[:100], highest[:100], rtol=1e-12)
    other_seed = sunspots.Sunspots(YEARS, VALUES, 100, 7, seed=2**64 - 1)
    other_seed.run()
    assert not np.isclose(other_seed.highest.ravel()[:100], highest[:100], rtol=1e-12).any()


@pytest.mark.parametrize(("resamplings", "block"), [(1, 1), (5, 10), (10, 5), (11, 5)])
def test_only_what_was_asked_for_counts(resamplings, block):
    sweep = sunspots.Sunspots(YEARS, VALUES, resamplings, block)
    answer = sweep.run()
    assert answer.resamplings == resamplings
    assert answer.level == sweep.highest.ravel()[:resamplings].max()  # of so few, the 99.9 % line is the highest


def test_picture_is_drawn(local):
    pytest.importorskip("matplotlib")
    picture = io.BytesIO()
    sunspots.draw(local[1], picture)
    assert picture.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--resamplings", "--block", "--seed"])
@pytest.mark.parametrize("text", ["-1", "1e5", "2.5", "many", "", str(2**64)])
def test_bad_numbers_are_refused(option, text, capsys):
    with pytest.raises(SystemExit) as stop:
        sunspots.read_options([option, text])
    assert stop.value.code == 2
    assert f"{option}: {text!r} is not a whole number from" in capsys.readouterr().err


def test_options():
    assert vars(sunspots.read_options([])) == {
        "resamplings": 100_000, "block": 250, "seed": 1, "picture": "sunspots.png", "quiet": False,
    }
    assert sunspots.read_options(["--seed", "0", "--block", "1"]).seed == 0
    for option in ("--resamplings", "--block"):
        with pytest.raises(SystemExit):
            sunspots.read_options([option, "0"])
