"""scipy's differential evolution on the ranks of an MPI run: the lowest point of a hilly function.

    mpiexec -n 4 python examples/pool_scipy.py
"""

import numpy as np
from scipy.optimize import differential_evolution

from jd_hpc import Pool


def hills(x):
    """Rastrigin's function: many valleys, the deepest, of depth 0, at the origin."""
    return 10 * len(x) + np.sum(x**2 - 10 * np.cos(2 * np.pi * x))


if __name__ == "__main__":
    with Pool() as pool:  # the slaves work in here, and only the master goes on
        found = differential_evolution(hills, [(-5.0, 5.0)] * 3, workers=pool.map, updating="deferred", rng=1, maxiter=150)
        print(f"depth {abs(found.fun):.4f} after {found.nfev} calls")
