"""How many walks of 20 steps on a square grid never cross their own path? A Monte Carlo, the same to the digit on any ranks.

    python examples/walks.py                    # one process
    mpiexec -n 4 python examples/walks.py       # one master, three slaves: the same line
    mpiexec -n 4 python examples/walks.py --journal walks.journal       # interrupt it, and start it again

A walk goes to one of the free neighbours. It counts for the product of how many there were at each step; one that gets stuck
counts nothing. The mean of that is the number of walks (M. N. Rosenbluth, A. W. Rosenbluth, J. Chem. Phys. 23, 356, 1955). For 20
steps it is known exactly.
"""

from __future__ import annotations

import argparse

import numpy as np
from mpi4py import MPI

from jd_hpc import map_array

STEPS = 20
KNOWN = 897_697_164
WALKS = 200
"""Of each job."""


def weight_of_a_walk(steps: int, rng: np.random.Generator) -> float:
    """Walk, and return the product of the numbers of choices; 0 if the walk got stuck."""
    x = y = 0
    seen = {(0, 0)}
    weight = 1.0
    for draw in rng.random(steps):
        free = [place for place in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)) if place not in seen]
        if not free:
            return 0.0
        weight *= len(free)
        x, y = free[int(draw * len(free))]
        seen.add((x, y))
    return weight


def mean_weight(steps: np.int64, rng: np.random.Generator) -> float:
    """One job: its random stream is its own, whoever runs it."""
    return float(np.mean([weight_of_a_walk(int(steps), rng) for _ in range(WALKS)]))


def main() -> None:
    """Run on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=400, help=f"jobs, of {WALKS} walks each")
    parser.add_argument("--seed", type=int, default=1955)
    parser.add_argument("--journal", help="keep the results in this file")
    arguments = parser.parse_args()

    steps = np.full(arguments.jobs, STEPS)
    means = map_array(
        mean_weight, steps, "f8", vm=MPI.COMM_WORLD, rng=True, seed=arguments.seed, grain=1, journal=arguments.journal
    )
    if means is not None:  # on the master
        error = means.std(ddof=1) / np.sqrt(len(means))
        print(f"{means.mean():.0f} +- {error:.0f} walks of {STEPS} steps; there are {KNOWN}")


if __name__ == "__main__":
    main()
