"""What `concurrent.futures` has, with an Executor over MPI; and ``python -m jd_hpc.futures script.py`` (docs/executor.md)."""

from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    BrokenExecutor,
    CancelledError,
    Future,
    InvalidStateError,
    TimeoutError,
    as_completed,
    wait,
)

from jd_hpc.executor import Executor

__all__ = [
    "ALL_COMPLETED",
    "FIRST_COMPLETED",
    "FIRST_EXCEPTION",
    "BrokenExecutor",
    "CancelledError",
    "Executor",
    "Future",
    "InvalidStateError",
    "TimeoutError",
    "as_completed",
    "wait",
]

if __name__ == "__main__":
    from jd_hpc.futures_server import main

    raise SystemExit(main())
