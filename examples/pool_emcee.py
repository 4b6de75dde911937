"""emcee on the ranks of an MPI run: a straight line through noisy points, sampled by an ensemble of walkers.

    mpiexec -n 4 python examples/pool_emcee.py
"""

import sys

import emcee
import numpy as np

from jd_hpc import Pool

SLOPE, OFFSET, NOISE = 2.0, -1.0, 0.3


def log_probability(parameters, x, y):
    slope, offset = parameters
    return -0.5 * np.sum(((y - slope * x - offset) / NOISE) ** 2)


def main(pool):
    rng = np.random.default_rng(1)
    x = np.linspace(0, 1, 200)
    y = SLOPE * x + OFFSET + NOISE * rng.normal(size=x.size)
    start = np.array([SLOPE, OFFSET]) + 0.1 * rng.normal(size=(32, 2))
    sampler = emcee.EnsembleSampler(32, 2, log_probability, args=(x, y), pool=pool)
    state = sampler.run_mcmc(start, 50)
    sampler.reset()
    sampler.run_mcmc(state, 150)
    slope, offset = sampler.get_chain(flat=True).mean(axis=0)
    print(f"slope {slope:.1f}, offset {offset:.1f}")


if __name__ == "__main__":
    with Pool() as pool:
        if not pool.is_master():
            pool.wait()
            sys.exit(0)
        main(pool)
