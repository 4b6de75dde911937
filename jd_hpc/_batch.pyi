# The compiled module _batch: rows of numbers, their buffers, and the evaluation of a batch.
from collections.abc import Callable, Iterable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

from jd_hpc.errors import KernelError
from jd_hpc.kernel import Kernel

@disjoint_base
class Rows:
    dtype: np.dtype[Any]
    base: np.dtype[Any]
    shape: tuple[int, ...]
    row_bytes: int
    def __init__(self, dtype: np.dtype[Any]) -> None: ...

@final
class Buffer:
    memory: NDArray[np.uint8]
    rows: NDArray[Any]  # None without a codec
    size: int
    offset: int
    def __init__(self, size: int, codec: Rows | None = None, offset: int = 0, writeable: bool = False) -> None: ...
    def kept(self) -> bool: ...

@disjoint_base
class Evaluator:
    kernel: Kernel | None
    def __init__(
        self,
        process_job: Callable[..., Any],
        process_jobs: Callable[..., Any] | None,
        job_rows: Rows | None,
        result_rows: Rows | None,
        allow_nan: bool,
        kernel: Kernel | None = None,
    ) -> None: ...
    def evaluate(
        self, jobs: Any, count: int, out: Buffer | None, results: list[Any] | None
    ) -> list[tuple[int, BaseException]]: ...

def kernel_failures(codes: Iterable[int]) -> list[tuple[int, KernelError]]: ...
