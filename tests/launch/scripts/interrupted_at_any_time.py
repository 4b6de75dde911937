"""Many runs; in each of them every rank gets a signal whose handler raises, each at a random time of its own."""

import random
import signal
import sys

from mpi4py import MPI
from script_helpers import RANK, Squares, note, say

rounds, seed = int(sys.argv[1]), sys.argv[2]
comm = MPI.COMM_WORLD


class Busy(Squares):
    count = 100_000

    def on_startup(self):
        # Armed inside of run(): what happens before a rank enters it is no business of the run's.
        signal.setitimer(signal.ITIMER_REAL, self.delay_s)

    def process_job(self, job):
        return bytes(10_000) if job % 3 else job

    def process_result(self, index, job, result):
        self.seen += 1


signal.signal(signal.SIGALRM, signal.default_int_handler)
interrupted = 0
for i in range(rounds):
    numbers = random.Random(f"{seed} {i} {RANK}")
    dispatcher = Busy(comm, credit=1 + i % 4)
    dispatcher.delay_s = 1e-6 + numbers.choice([0.0, 0.0003, 0.002, 0.01]) * numbers.random() + random.Random(f"{seed} {i}").random() * 0.003
    try:
        try:
            dispatcher.run()
        finally:
            while signal.getitimer(signal.ITIMER_REAL)[0] > 0:  # one that was not heard yet must not hit the next round
                signal.pause()
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
    comm.Barrier()
    answer = Squares(comm).run()
    assert answer == (None if RANK else (100, 328350)), (seed, i, answer)
note(f"interrupted{RANK}", interrupted)
if RANK == 0:
    say("rounds", rounds)
