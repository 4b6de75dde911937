"""For `python -m jd_hpc.futures`: nothing here looks at `__name__`."""

from jd_hpc.futures import Executor


def square(x):
    return x * x


print(*Executor().map(square, range(5)), flush=True)
