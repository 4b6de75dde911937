"""A Pool on every rank of COMM_WORLD, or under `python -m jd_hpc.futures`. Argument: what is to happen."""

import os
import pickle
import signal
import sys
import time

from script_helpers import RANK, note, say

from jd_hpc import Executor, LocalMachine, Pool, dispatch

what = sys.argv[1]
if what == "no cloudpickle":
    sys.modules["cloudpickle"] = None  # import it, and it is not there


class Unfriendly:
    def __reduce__(self):
        raise TypeError("no copies of me")

    def __call__(self, x):
        return x


class Fragile:
    """Pickles well, and cannot be rebuilt."""

    def __reduce__(self):
        return int, ("no number",)


def square(x):
    return x * x


def fail_at(x):
    if x == 13:
        raise ValueError(f"no {x}")
    return x


def unfriendly(x):
    return Unfriendly() if x == 2 else x


def fragile(x):
    return Fragile() if x == 2 else x


def large(x):
    return bytes(x)


def die(x):
    if x == 5 and not os.path.exists("note.died"):  # noqa: PTH110
        note("died", x)
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def always_die(x):
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def interrupt_the_master(pid):
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)


def nest(x):
    return Pool(LocalMachine()).map(square, [x, x + 1])


def breaks_off():
    yield 1
    yield 2
    raise OSError("the disk is gone")


def caught(call, *args, **kwargs):
    """Say what a call raises, and what caused it."""
    try:
        say("returned", call(*args, **kwargs))
    except Exception as error:
        say(type(error).__name__, str(error).split("\n")[0], type(error.__cause__).__name__)


def taken(results):
    """Say what comes out of an iterator, and what it raises."""
    try:
        for result in results:
            say("got", result)
    except Exception as error:
        say(type(error).__name__, error)


def bad_input(pool):
    caught(pool.map, Unfriendly(), range(3))
    caught(pool.map, square, [1, Unfriendly(), 3])
    caught(pool.apply, Unfriendly(), (1,))
    caught(pool.map, unfriendly, range(4))
    caught(pool.map, fragile, range(4))
    caught(pool.map, fail_at, range(100))
    caught(pool.starmap, fail_at, range(3))
    caught(pool.map, square, breaks_off())
    taken(pool.imap(square, breaks_off()))
    taken(pool.imap(square, breaks_off(), chunksize=3))
    taken(sorted(pool.imap_unordered(square, range(3))))
    caught(list, pool.imap_unordered(fail_at, [13]))
    caught(pool.map, square, [1], chunksize=0)
    caught(pool.map, square, 5)
    caught(pickle.dumps, pool)
    caught(pool.join)
    say("then", pool.map(square, range(5)))


def too_large(pool):
    caught(pool.map, len, [b"", bytes(200_000)])
    caught(pool.map, large, [10, 200_000])
    say("then", [len(data) for data in pool.map(large, [90_000] * 3)])


def after_the_end(pool):
    pool.close()
    pool.join()
    pool.join()
    for use in (pool.map, pool.imap, pool.imap_unordered, pool.apply_async, pool.map_async):
        caught(use, square, [1])
    pool.close()
    pool.wait()
    pool.terminate()


def main(pool):
    if what == "bad input":
        bad_input(pool)
    elif what == "too large":
        too_large(pool)
    elif what == "no cloudpickle":
        caught(pool.map, lambda x: x + 1, [1])
        say("then", pool.map(square, range(5)))
    elif what == "lambda":
        say("then", pool.map(lambda x: x + len(what), range(5)))
    elif what == "dies":
        say("then", pool.map(die, range(20)))
    elif what == "always dies":
        caught(pool.map, always_die, range(20))
        caught(pool.map, square, range(5))
    elif what == "interrupt":
        pool.map(interrupt_the_master, [os.getpid()])
        time.sleep(20)
    elif what == "ctrl-c":
        note("running", "yes")
        pool.map(time.sleep, [0.05] * 100_000)
    elif what == "uncaught":
        results = [pool.apply_async(time.sleep, (0.2,)) for _ in range(1000)]
        say(len(results))
        raise OSError("disk full")
    elif what == "terminate":
        later = pool.map_async(time.sleep, [0.1] * 1000)
        time.sleep(0.3)
        pool.terminate()
        pool.join()
        caught(later.get, 5)
    elif what == "after the end":
        after_the_end(pool)
    elif what == "nested":
        say("then", pool.map(nest, range(3)))


options = {"payload_limit": 100_000} if what == "too large" else {}
if what == "no with":
    pool = Pool()
    say("then", pool.map(square, range(5)))
    later = pool.map_async(time.sleep, [0.1] * 3)
elif what == "slaves go on":
    with Pool(serve=False) as pool:
        if pool.is_master():
            say("then", pool.map(square, range(5)))
        else:
            try:
                pool.map(square, [1])
            except RuntimeError as error:
                note(f"slave{RANK}", error)
            pool.wait()
    note(f"end{RANK}", "yes")
elif what == "second pool":
    with Pool() as pool:
        say("then", pool.map(square, range(5)))
    from mpi4py import MPI

    caught(Pool)
    caught(Executor, MPI.COMM_WORLD)
    caught(dispatch, [(square, [1])], vm=MPI.COMM_WORLD)
    say("then", Pool(LocalMachine()).map(square, range(5)))
elif what == "slaves have left":
    pool = Pool(serve=False)
    if not pool.is_master():
        pool.wait()
        sys.exit(0)
    pool.close()
    pool.join()
    with Pool() as pool:
        say("then", pool.map(square, range(5)))
elif what == "slaves do not wait":
    with Pool(serve=False) as pool:
        if not pool.is_master():
            sys.exit(0)
        say("then", pool.map(square, range(5)))
else:
    with Pool(**options) as pool:
        if not pool.is_master():
            pool.wait()
            sys.exit(0)
        main(pool)
    say("end")
