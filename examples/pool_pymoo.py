"""pymoo on the ranks of an MPI run: the trade-off between weight and bending of a beam, by NSGA-II.

    mpiexec -n 4 python examples/pool_pymoo.py
"""

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize
from pymoo.parallelization.starmap import StarmapParallelization

from jd_hpc import Pool


class Beam(ElementwiseProblem):
    def __init__(self, **options):
        super().__init__(n_var=2, n_obj=2, xl=np.array([0.02, 0.02]), xu=np.array([0.2, 0.2]), **options)

    def _evaluate(self, x, out, *args, **kwargs):
        width, height = x
        out["F"] = [width * height, 1 / (width * height**3)]  # its weight, its bending under a load


if __name__ == "__main__":
    with Pool() as pool:
        problem = Beam(elementwise_runner=StarmapParallelization(pool.starmap))
        found = minimize(problem, NSGA2(pop_size=40), ("n_gen", 30), seed=1)
        print(f"{len(found.F)} beams, the lightest {found.F[:, 0].min():.4f}, the stiffest {found.F[:, 1].min():.0f}")
