# The compiled module _beat: a C thread that sends one byte per period.
from typing import Self, final

BEAT: bytes

@final
class Beat:
    def __new__(cls, fd: int, period_s: float) -> Self: ...
    @property
    def alive(self) -> bool: ...
    def stop(self) -> None: ...
