"""A script as it is written for schwimmbad: only the import is another one.

    mpiexec -n 4 python examples/pool_schwimmbad.py
"""

import sys
from itertools import pairwise

import numpy as np

from jd_hpc import Pool as MPIPool  # was: from schwimmbad import MPIPool


def worker(task):
    low, high = task
    x = np.linspace(low, high, 10_001)
    return np.trapezoid(4 / (1 + x**2), x)


def main(pool):
    edges = np.linspace(0, 1, 65)
    tasks = list(pairwise(edges))
    seen = []
    results = pool.map(worker, tasks, callback=seen.append)
    print(f"{len(seen)} parts, pi = {sum(results):.6f}")


if __name__ == "__main__":
    with MPIPool() as pool:
        if not pool.is_master():
            pool.wait()
            sys.exit(0)
        main(pool)
