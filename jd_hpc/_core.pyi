# The compiled core: one stub for all families; the module is installed as _core_<family>.
from collections.abc import Callable
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

from jd_hpc.errors import Failure
from jd_hpc.messages import Handlers
from jd_hpc.plan import Plan
from jd_hpc.progress import Progress
from jd_hpc.scheduler import Scheduler
from jd_hpc.sharing import Address
from jd_hpc.signals import Asked
from jd_hpc.survival import Watch
from jd_hpc.walltime import Drain

@disjoint_base
class Link:
    rank: int
    size: int
    run: int
    dropped: int
    early: list[tuple[int, bytes]]
    parting: bool
    impatient: bool

@final
class Letter: ...

@disjoint_base
class Postal(Link):
    handlers: Handlers

@disjoint_base
class Correspondent(Postal):
    def tell(self, message: Any, destination: int = 0) -> None: ...
    def broadcast(self, message: Any) -> int: ...
    def poll_letters(self) -> int: ...

class StoppedAtWork(BaseException): ...

@final
class Slave(Correspondent):
    failed: bool
    drained: bool
    parted: bool
    beat: Any
    asked: Asked | None
    def __new__(cls, handle: int, run: int, body_turn: NDArray[np.uint32]) -> Self: ...
    def begin(self, plan: Plan | None = None) -> None: ...
    def ready(self, facts: dict[str, str]) -> None: ...
    def ask_for_shared(
        self, told: dict[str, Any], make_memory: Callable[[int], NDArray[np.uint8]]
    ) -> tuple[bool, bool, NDArray[np.uint8]] | None: ...
    def tell_shared(self, told: dict[str, Any]) -> None: ...
    def tell_broken(self, failure: Failure) -> None: ...
    def serve(self) -> None: ...
    def report(self, error: BaseException) -> None: ...
    def leave(self) -> None: ...
    def look_out(self) -> None: ...
    def close(self) -> None: ...

@final
class Share: ...

@disjoint_base
class Sharer(Postal):
    def share(self, data: NDArray[np.uint8], size: int, address: Address | None) -> None: ...

@disjoint_base
class JobSender(Sharer):
    scheduler: Scheduler

@final
class Piece: ...

@disjoint_base
class Postmaster(JobSender):
    def tell(self, message: Any, destination: int = 0) -> bool: ...
    def broadcast(self, message: Any) -> int: ...
    def poll_letters(self) -> int: ...

@disjoint_base
class Survivor(Postmaster):
    progress: Progress | None
    dead: set[int]
    missing: set[int]
    failed: bool
    @property
    def watched(self) -> bool: ...
    def counts(self) -> tuple[int, int, int, int]: ...
    def busy_slaves(self) -> int: ...
    def note(self, event: str, **facts: Any) -> None: ...
    def watch_over(self, watch: Watch, acknowledge: Callable[[], list[int]], grace_s: float) -> None: ...

@disjoint_base
class Drainer(Survivor):
    left: tuple[int, int, int] | None
    def drain_by(self, drain: Drain, asked: Asked | None) -> None: ...

@disjoint_base
class Deliverer(Drainer): ...

@final
class Master(Deliverer):
    slave_count: int
    stop_began: bool
    def __new__(
        cls,
        handle: int,
        run: int,
        body_turn: NDArray[np.uint32],
        early: list[tuple[int, bytes]],
        dead: set[int],
        missing: set[int],
    ) -> Self: ...
    def begin(self, plan: Plan | None, slave_count: int) -> None: ...
    def run_jobs(self) -> None: ...
    def wake(self) -> None: ...
    def break_off(self, error: BaseException) -> None: ...
    def look_around(self) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def stop(self) -> None: ...

FAILED_CLASSES: set[int]
ASKS: str
UNREADABLE: tuple[type[Exception], ...]
ALIGN_BYTES: int
GIVE_UP_AFTER: int

def layout() -> dict[str, Any]: ...
