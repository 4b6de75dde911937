"""How fast dispatch() makes calls, and whether its memory grows with their number.

mpiexec -n 2 python dispatch_memory.py --jobs 10000000 --grain 100
"""

import argparse
import time
from pathlib import Path

from mpi4py import MPI

from jd_hpc import dispatch


def last_bit(number):
    return number & 1


def count_and_sum(totals):
    while True:
        _, _, result = yield
        totals[0] += 1
        totals[1] += result


def highest_memory_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def run(jobs, grain):
    """Return the seconds that it took; every result is counted."""
    totals = [0, 0]
    begun_s = time.perf_counter()
    dispatch(((last_bit, [n]) for n in range(jobs)), count_and_sum(totals), vm=MPI.COMM_WORLD, grain=grain)
    took_s = time.perf_counter() - begun_s
    assert MPI.COMM_WORLD.rank or totals == [jobs, jobs // 2]
    return took_s


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--jobs", type=int, default=1_000_000)
parser.add_argument("--grain", type=int, default=100)
options = parser.parse_args()
run(10_000, options.grain)
few = MPI.COMM_WORLD.gather(highest_memory_mb())
seconds = run(options.jobs, options.grain)
many = MPI.COMM_WORLD.gather(highest_memory_mb())
if few and many:
    grown = ", ".join(f"{after - before:.1f}" for before, after in zip(few, many, strict=True))
    print(f"{options.jobs} jobs, grain {options.grain}: {options.jobs / seconds:.0f} jobs/s; each rank's memory grew by {grown} MB")
