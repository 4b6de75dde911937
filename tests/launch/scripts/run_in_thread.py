"""A run in a thread other than the main one, at the thread level that is given: run_in_thread.py level."""

import sys
import threading

import mpi4py

mpi4py.rc.thread_level = sys.argv[1]

from mpi4py import MPI  # noqa: E402
from script_helpers import RANK, Squares, say  # noqa: E402


def work():
    try:
        answer = Squares(MPI.COMM_WORLD).run()
    except Exception as error:
        say("refused", RANK, type(error).__name__, "Cure: " in str(error))
    else:
        say("answer", RANK, answer)


thread = threading.Thread(target=work)
thread.start()
thread.join()
if sys.argv[1] != "multiple":
    say("main", RANK, Squares(MPI.COMM_WORLD).run())
