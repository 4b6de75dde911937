"""CPython's own tests of executors on jd_hpc's, for `python -m jd_hpc.futures`. Argument: the folder of test_concurrent_futures.py."""

import sys
import unittest

sys.path.insert(0, sys.argv.pop(1))

import test_concurrent_futures as theirs

from jd_hpc import Executor

DO_NOT_APPLY = {
    "test_interpreter_shutdown": "imports the executor from concurrent.futures, in another process",
    "test_submit_after_interpreter_shutdown": "likewise",
    "test_hang_gh83386": "likewise",
}


class OursMixin(theirs.ExecutorMixin):
    executor_type = Executor


class Wait(OursMixin, theirs.WaitTests, theirs.BaseTestCase):
    pass


class AsCompleted(OursMixin, theirs.AsCompletedTests, theirs.BaseTestCase):
    pass


class Common(OursMixin, theirs.ExecutorTest, theirs.BaseTestCase):
    test_map_chunksize = theirs.ProcessPoolExecutorTest.test_map_chunksize


class Shutdown(OursMixin, theirs.ExecutorShutdownTest, theirs.BaseTestCase):
    pass


class Initializer(OursMixin, theirs.BaseTestCase):
    executor_kwargs = {"initializer": theirs.init, "initargs": ("initialized",)}

    def test_initializer(self):
        futures = [self.executor.submit(theirs.get_init_status) for _ in range(10)]
        assert [future.result() for future in futures] == ["initialized"] * 10


if __name__ == "__main__":
    for name in DO_NOT_APPLY:
        assert hasattr(Shutdown, name), name
        setattr(Shutdown, name, unittest.skip(DO_NOT_APPLY[name])(getattr(Shutdown, name)))
    unittest.main(verbosity=2)
