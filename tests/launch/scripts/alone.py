"""What a process finds that no mpiexec started: no MPI is imported unless there is a vm, and silent singletons are refused."""

import sys

import jd_hpc


class Squares(jd_hpc.JobDispatcher):
    def reset(self):
        self.at = self.total = 0

    def next_job(self):
        self.at += 1
        return self.at if self.at <= 10 else None

    def process_job(self, job):
        return job * job

    def process_result(self, index, job, result):
        self.total += result

    def postprocess(self):
        return self.total


if sys.argv[1] == "local":
    answer = Squares().run()
    assert not any(name.startswith("mpi4py") for name in sys.modules), "a local run imported MPI"
else:
    from mpi4py import MPI

    answer = Squares(jd_hpc.MPIMachine(MPI.COMM_WORLD) if sys.argv[1] == "machine" else MPI.COMM_WORLD).run()
print("answer", answer)
