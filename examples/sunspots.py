"""Is the 11-year cycle of the sunspots more than chance?  A bootstrap in one short class.

    python examples/sunspots.py                    one process, no MPI needed
    mpiexec -n 4 python examples/sunspots.py       one master and three slaves
    srun -n 64 python examples/sunspots.py         the same on a cluster

The periodogram of the yearly sunspot numbers 1700-2008 peaks at 11 years. How often would years that know nothing of
each other (white noise) peak as high? Shuffle them: every value stays, all order is lost. Take the highest peak, do it
100,000 times: the share of shuffled series that reach the real peak is its false-alarm probability.

Four rules that your own sweep can copy:

1. A job is small: the number of its first resampling. What all jobs share (data, tables), every rank builds in
   `__init__`.
2. A job is worth its journey: 250 resamplings take some 15 ms, a message some microseconds.
3. Randomness belongs to the resampling, not to the rank: each one has a random stream keyed by its own number.
4. Results are stored by job number, not in order of arrival. By 3 and 4 the digits do not depend on how many ranks ran.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# One rank, one core: ranks that each start BLAS threads for the whole machine only slow each other down. BLAS reads
# these once, when numpy is imported, so they come first.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from jd_hpc import JobDispatcher  # noqa: E402

try:
    from tqdm import tqdm
except ImportError:  # then there is no bar, that is all
    tqdm = None

Floats = NDArray[np.float64]
DATA = Path(__file__).resolve().parent / "data" / "sunspots.csv"
CONFIDENCE = 0.999  # the line in the picture: 1 of 1000 series without a cycle peaks above it

# Cycles per year, about 6 points per resolvable step 1/309. The Nyquist frequency 0.5 is left out: at whole years all
# its sines are zero, and the periodogram would divide rounding errors by each other.
FREQUENCIES = np.linspace(1 / 150, 0.5, 1000, endpoint=False)


class Answer(NamedTuple):
    """What the bootstrap found; powers are in units of the variance of the series."""

    power: Floats  #: periodogram of the real series at FREQUENCIES
    peak_period: float  #: where it peaks, in years
    peak_power: float
    level: float  #: power that only 1 - CONFIDENCE of the shuffled series exceed
    reached: int  #: how many shuffled series reached the real peak
    resamplings: int  #: of how many

    def __str__(self) -> str:
        """The answer in two lines."""
        share = f"{self.reached / self.resamplings:.2g}" if self.reached else f"below {1 / self.resamplings:.2g}"
        return (f"peak: {self.peak_period:.1f} years, normalised power {self.peak_power:.1f}\n"
                f"false-alarm probability {share} ({self.reached} of {self.resamplings} shuffled series); "
                f"{100 * CONFIDENCE:.1f} % line at power {self.level:.1f}")


class Periodogram:
    """Lomb-Scargle periodogram of many series that share their times, as two matrix products.

    The tables depend on the times only, so they are made once. With tau(f) the time offset that makes sine and cosine
    orthogonal, for a series x of mean 0 and variance 1::

        P(f) = (sum x cos 2 pi f (t - tau))^2 / (2 sum cos^2) + (sum x sin 2 pi f (t - tau))^2 / (2 sum sin^2)

    In white noise one P(f) exceeds z with probability exp(-z); the highest of a thousand has no such simple law, hence
    the bootstrap.

    Parameters
    ----------
    times : (n,) array
        When the values were taken, in years; any spacing.
    frequencies : (m,) array
        Cycles per year, above 0.

    References
    ----------
    N. R. Lomb, Astrophysics and Space Science 39 (1976) 447-462.
    J. D. Scargle, Astrophysical Journal 263 (1982) 835-853.
    """

    def __init__(self, times: Floats, frequencies: Floats) -> None:
        angles = 2 * np.pi * np.outer(times - times.mean(), frequencies)
        offsets = 0.5 * np.arctan2(np.sin(2 * angles).sum(axis=0), np.cos(2 * angles).sum(axis=0))  # 2 pi f tau
        cosines, sines = np.cos(angles - offsets), np.sin(angles - offsets)
        self.cosines = cosines / np.sqrt(2 * (cosines**2).sum(axis=0))
        self.sines = sines / np.sqrt(2 * (sines**2).sum(axis=0))

    def __call__(self, series: Floats) -> Floats:
        """Power (k, m) of k series (k, n), each of mean 0 and variance 1."""
        return (series @ self.cosines) ** 2 + (series @ self.sines) ** 2


class Sunspots(JobDispatcher):
    """Bootstrap of the highest peak in the periodogram of a series.

    Parameters
    ----------
    years, values : (n,) array
        The series.
    resamplings, block : int
        How many shuffled series, and how many of them make one job.
    seed : int
        0 to 2**64 - 1; another seed shuffles otherwise.
    bar : bool
        Show a progress bar on standard error (needs tqdm).
    **run
        For `JobDispatcher`: `vm`, `max_slaves`, ...
    """

    job_dtype = np.dtype("i8")  # a job: the number of its first resampling

    def __init__(self, years: Floats, values: Floats, resamplings: int = 100_000, block: int = 250, seed: int = 1,
                 bar: bool = False, **run) -> None:
        super().__init__(**run)
        # All of this happens on every rank, so the jobs need not carry it.
        self.resamplings, self.block, self.seed, self.bar = resamplings, block, seed, bar
        self.periodogram = Periodogram(years, FREQUENCIES)
        # Shuffling changes neither mean nor variance: once here is enough.
        self.series = (values - values.mean()) / values.std(ddof=1)
        self.result_dtype = np.dtype(("f8", (block,)))  # a result: the highest power of each resampling

    def reset(self) -> None:
        """Master, at the start of a run: an empty table, one row per job."""
        firsts = range(0, self.resamplings, self.block)
        self.jobs = iter(firsts)
        self.highest = np.full((len(firsts), self.block), np.nan)
        self.progress = tqdm(total=self.resamplings, unit=" series") if self.bar and tqdm else None

    def next_job(self) -> int | None:
        """Master: the next job, None after the last."""
        return next(self.jobs, None)

    def process_job(self, first: int) -> Floats:
        """Slave: the highest power of each of the resamplings first, first + 1, ..."""
        shuffled = np.empty((self.block, self.series.size))
        for number, row in enumerate(shuffled, start=first):
            key = np.array((self.seed, number), dtype=np.uint64)
            row[:] = np.random.Generator(np.random.Philox(key=key)).permutation(self.series)
        return self.periodogram(shuffled).max(axis=1)

    def process_result(self, index: int, first: int, highest: Floats) -> None:
        """Master, once per job in any order: store the row under the job's number."""
        self.highest[index] = highest
        if self.progress is not None:
            self.progress.update(min(self.block, self.resamplings - int(first)))

    def postprocess(self) -> Answer:
        """Master, after the last result: what `run` returns."""
        if self.progress is not None:
            self.progress.close()
        highest = self.highest.ravel()[: self.resamplings]  # the last job may run past the end: all have one shape
        power = self.periodogram(self.series[np.newaxis])[0]
        peak = power.argmax()
        return Answer(
            power=power,
            peak_period=float(1 / FREQUENCIES[peak]),
            peak_power=float(power[peak]),
            level=float(np.quantile(highest, CONFIDENCE, method="higher")),
            reached=int(np.count_nonzero(highest >= power[peak])),
            resamplings=self.resamplings,
        )


def draw(answer: Answer, path: str) -> None:
    """Write the periodogram, with the line and the peak marked, to `path`."""
    from matplotlib.figure import Figure  # without pyplot: no window, no display needed

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    peak = (answer.peak_period, answer.peak_power)
    axes.semilogx(1 / FREQUENCIES, answer.power, color="tab:blue", linewidth=1.2)
    axes.axhline(answer.level, color="tab:red", linestyle="--", linewidth=1)
    line = f"{100 * CONFIDENCE:.1f} % line: power {answer.level:.1f}"
    axes.annotate(line, (2.1, answer.level), (0, 4), textcoords="offset points", color="tab:red")
    axes.plot(*peak, "o", color="tab:orange")
    axes.annotate(f"{peak[0]:.1f} years: power {peak[1]:.1f}", peak, (8, -4), textcoords="offset points")
    ticks = [2, 3, 4, 5, 7, 11, 15, 20, 30, 50, 70, 100, 150]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlim=(2, 150), ylim=(0, None), xlabel="period (years)", ylabel="power (units of the variance)")
    axes.set_title("Lomb-Scargle periodogram of the yearly sunspot numbers 1700-2008")
    figure.savefig(path, dpi=150)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Make the type of a command line option: a whole number from `least` to `most`."""
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)
    return parse


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="How sure is the 11-year peak of the sunspots? Lomb-Scargle periodogram of the yearly numbers "
        "1700-2008, and, by shuffling the years, the power that chance alone reaches.",
        epilog="Run it alone, or under mpiexec or srun: the numbers are the same.",
    )
    for name, default, least, most, text in (
        ("--resamplings", 100_000, 1, 10**9, "shuffled series; the 99.9 %% line needs 1000 or more"),
        ("--block", 250, 1, 100_000, "shuffled series per job"),
        ("--seed", 1, 0, 2**64 - 1, "another seed shuffles otherwise"),
    ):
        text += " (default: %(default)s)"
        parser.add_argument(name, metavar="N", type=whole_number(least, most), default=default, help=text)
    text = "where to draw the periodogram, '' for nowhere (default: %(default)s)"
    parser.add_argument("--picture", metavar="FILE", default="sunspots.png", help=text)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def main() -> None:
    """Run on all ranks; the master prints and draws."""
    options = read_options()
    try:
        from mpi4py import MPI
        vm = MPI.COMM_WORLD
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but no MPI
        print(f"no MPI, running in this process ({str(error).splitlines()[0]})", file=sys.stderr)
        vm = None
    years, values = np.loadtxt(DATA, delimiter=",", skiprows=1, unpack=True)
    answer = Sunspots(years, values, options.resamplings, options.block, options.seed, not options.quiet, vm=vm).run()
    if answer is None:
        return  # a slave
    print(answer)
    if options.picture:
        try:
            draw(answer, options.picture)
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
