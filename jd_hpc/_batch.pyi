# The compiled module _batch: rows of numbers, their buffers, and the evaluation of a batch.
from collections.abc import Callable, Iterable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

from jd_hpc.errors import Failure, KernelError
from jd_hpc.kernel import Kernel

@disjoint_base
class Rows:
    dtype: np.dtype[Any]
    base: np.dtype[Any]
    shape: tuple[int, ...]
    row_bytes: int
    def __init__(self, dtype: np.dtype[Any]) -> None: ...
    def write(self, rows: NDArray[Any], at: int, value: Any, what: str) -> None: ...
    def read(self, rows: NDArray[Any], at: int) -> Any: ...

@final
class Buffer:
    memory: NDArray[np.uint8]
    rows: NDArray[Any]  # None without a codec
    size: int
    offset: int
    def __init__(
        self,
        size: int,
        codec: Rows | None = None,
        offset: int = 0,
        writeable: bool = False,
        memory: NDArray[np.uint8] | None = None,
    ) -> None: ...
    def kept(self) -> bool: ...

@final
class SharedNumber:
    def __init__(self, memory: NDArray[np.int64], at: int) -> None: ...
    def get(self) -> int: ...
    def set(self, value: int) -> None: ...
    def becomes(self, value: int, most_ns: int) -> bool: ...

@disjoint_base
class Evaluator:
    process_job: Callable[..., Any]
    process_jobs: Callable[..., Any] | None
    job_rows: Rows | None
    result_rows: Rows | None
    allow_nan: bool
    kernel: Kernel | None
    def __init__(
        self,
        process_job: Callable[..., Any],
        process_jobs: Callable[..., Any] | None,
        job_rows: Rows | None,
        result_rows: Rows | None,
        allow_nan: bool,
        kernel: Kernel | None = None,
        stream: Callable[[int], np.random.Generator] | None = None,
        owner: Any = None,
    ) -> None: ...
    def close(self) -> None: ...
    def watch(
        self, running: SharedNumber, on_failure: Callable[[int, BaseException], None], codes: NDArray[np.int32] | None
    ) -> None: ...
    def check_nan(self, count: int, out: Buffer, failures: list[tuple[int, BaseException]]) -> int: ...
    def evaluate(
        self, jobs: Any, count: int, out: Buffer | None, results: list[Any] | None, first: int = 0
    ) -> list[tuple[int, BaseException | Failure]]: ...

def fingerprints(rows: NDArray[Any]) -> NDArray[np.uint64]: ...
def kernel_failures(codes: Iterable[int]) -> list[tuple[int, KernelError]]: ...
