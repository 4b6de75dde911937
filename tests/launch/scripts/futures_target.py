"""For `python -m jd_hpc.futures`. Argument: what is to happen."""

import os
import signal
import sys
import threading
import time

import script_helpers  # noqa: F401  its watchdog

from jd_hpc import Executor, Pool

what = sys.argv[1]


if what == "fails on slaves" and __name__ != "__main__":
    raise OSError("no such node")


class Point:
    """An instance that is made on a slave is one of the master's class."""

    def __init__(self, x):
        self.x = x


def point(x):
    return Point(x)


def square(x):
    return x * x


def set_up(value):
    global known
    known = value


def add_known(x):
    return known + x


def fail(x):
    raise ValueError(f"no {x}")


def nest(count):
    with Executor() as pool:
        return list(pool.map(square, range(count)))


def nap(seconds):
    time.sleep(seconds)
    return seconds


def die(x):
    os.kill(os.getpid(), signal.SIGKILL)


def use():
    if what == "many":
        with Executor() as pool:
            points = list(pool.map(point, range(5)))
            assert all(type(one) is Point for one in points)
            print([one.x for one in points])
        with Executor(initializer=set_up, initargs=(100,)) as pool:
            print(list(pool.map(add_known, range(5))))
        pool = Executor(max_workers=1)
        print(pool.submit(pow, 2, 10).result())
        pool.shutdown(wait=False)
        print(Executor().submit(pow, 2, 11).result())
    elif what == "two at once":
        with Executor() as pool:
            pool.submit(square, 1)
            Executor().submit(square, 2)
    elif what == "nested":
        with Executor() as pool:
            print(list(pool.map(nest, [1, 3])))
    elif what == "fails on slaves":
        with Executor() as pool:
            pool.submit(square, 1).result()
    elif what == "broken":
        with Executor(initializer=fail, initargs=(1,)) as pool:
            pool.submit(square, 1).result()
    elif what == "no shutdown":
        future = Executor().submit(nap, 0.5)
        future.add_done_callback(lambda future: print("slept", future.result(), flush=True))
    elif what == "uncaught":
        Executor().submit(fail, 1).result()
    elif what == "exit code":
        print(Executor().submit(square, 3).result(), flush=True)
        sys.exit(7)
    elif what == "nothing":
        print("nothing")
    elif what == "interrupt":
        with Executor() as pool:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            list(pool.map(nap, [0.1] * 1000))
    elif what.startswith("drained"):
        with Pool() if what.endswith("pool") else Executor() as pool:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2)).start()
            list(pool.map(nap, [0.05] * 1000))
    elif what == "slave dies":
        with Executor(max_attempts=1) as pool:
            print(type(pool.submit(die, 0).exception()).__name__)
            print(sum(pool.map(square, range(100))), flush=True)


if __name__ == "__main__":
    use()
