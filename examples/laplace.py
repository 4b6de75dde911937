"""Jobs that are parallel themselves: the Laplace equation on a square, each solution by the ranks of a group together.

    python examples/laplace.py                              one process: the groups are of one rank
    mpiexec -n 5 python examples/laplace.py                 a master and two groups of two ranks
    mpiexec -n 9 python examples/laplace.py --ranks 4       two groups of four

The square's upper edge has the values sin(k pi x), the other edges 0. A job is the number k. The ranks of a group have a
strip of the grid's rows each; they exchange the rows at their borders and add up by `self.comm`, which only they have.
The solution is known, so the script prints how far off the grid is. The digits do not depend on the number of ranks.
"""

from __future__ import annotations

import argparse

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from jd_hpc import JobDispatcher, MPIMachine

Grid = NDArray[np.float64]


class Laplace(JobDispatcher):
    """Largest error on a grid of points * points, for 1 to `most_waves` waves at the edge."""

    def __init__(self, vm: MPIMachine, points: int, most_waves: int) -> None:
        super().__init__(vm)
        self.points, self.most_waves = points, most_waves

    def reset(self) -> None:
        self.waves = 0
        self.errors: dict[int, float] = {}

    def next_job(self) -> int | None:
        self.waves += 1
        return self.waves if self.waves <= self.most_waves else None

    def process_job(self, waves: int) -> float:
        """Every rank of the group is in here, with the same job. What the first one returns is the result."""
        x = np.linspace(0, 1, self.points + 2)[1:-1]
        first, last = (self.points * (self.comm.rank + at) // self.comm.size for at in (0, 1))
        y = x[first:last, None]  # this rank's rows
        edge = np.zeros((last - first, self.points))
        if last == self.points:
            edge[-1] = np.sin(waves * np.pi * x)
        solution = self.solve(edge)
        exact = np.sin(waves * np.pi * x) * np.sinh(waves * np.pi * y) / np.sinh(waves * np.pi)
        return float(self.comm.allreduce(np.abs(solution - exact).max(), MPI.MAX))

    def solve(self, right: Grid) -> Grid:
        """Conjugate gradients: solve (4 u - the four neighbours) = right."""
        solution = np.zeros_like(right)
        residual, direction = right.copy(), right.copy()
        square = self.sum(residual * residual)
        while square > 1e-24:
            image = self.apply(direction)
            step = square / self.sum(direction * image)
            solution += step * direction
            residual -= step * image
            square, before = self.sum(residual * residual), square
            direction = residual + square / before * direction
        return solution

    def apply(self, u: Grid) -> Grid:
        """Return 4 u - the four neighbours; those in other strips are asked for."""
        below, above = self.comm.rank - 1, self.comm.rank + 1
        below = below if below >= 0 else MPI.PROC_NULL
        above = above if above < self.comm.size else MPI.PROC_NULL
        tall = np.zeros((len(u) + 2, self.points))
        tall[1:-1] = u
        self.comm.Sendrecv(u[-1].copy(), above, recvbuf=tall[0], source=below)
        self.comm.Sendrecv(u[0].copy(), below, recvbuf=tall[-1], source=above)
        image = 4 * u - tall[:-2] - tall[2:]
        image[:, 1:] -= u[:, :-1]
        image[:, :-1] -= u[:, 1:]
        return image

    def sum(self, values: Grid) -> float:
        return float(self.comm.allreduce(values.sum()))

    def process_result(self, index: int, waves: int, error: float) -> None:
        self.errors[waves] = error

    def postprocess(self) -> dict[int, float]:
        return dict(sorted(self.errors.items()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2, help="ranks of a group")
    parser.add_argument("--points", type=int, default=40, help="points of the grid along an edge")
    parser.add_argument("--waves", type=int, default=6, help="number of jobs")
    options = parser.parse_args()
    machine = MPIMachine(MPI.COMM_WORLD, options.ranks, leave_rest_idle=True)
    errors = Laplace(machine, options.points, options.waves).run()
    if errors is not None:
        for waves, error in errors.items():
            print(f"{waves} waves: largest error {error:.2e}")


if __name__ == "__main__":
    main()
