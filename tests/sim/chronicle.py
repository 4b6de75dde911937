"""Books that also write the history of the simulated run, as the compiled core does of a real one."""

from __future__ import annotations

from types import ModuleType

from books import Books, Dispatch
from scenario import Scenario

from jd_hpc.history import History

VERDICTS = ("deliver", "late", "refused")


class Chronicle(Books):
    """Writes to `path`. Call `end` at last."""

    path = ""

    def __init__(self, module: ModuleType, scenario: Scenario, slots: int) -> None:
        super().__init__(module, scenario, slots)
        self.history = History(self.path)
        options = {"grain": scenario.grain, "credit": scenario.credit, "max_attempts": scenario.max_attempts}
        options |= {"min_slaves": 0, "isolate": False}
        self.history.begin({"slaves": scenario.slaves, "mpi": "simulated", "options": options})

    def end(self, error: BaseException | None) -> None:
        names = {"messages sent": "sent", "late results dropped": "late", "slaves lost": "lost", "slaves suspected": "suspected"}
        self.history.counters = {name: getattr(self.s, attribute) for name, attribute in names.items()}
        self.history.counters["jobs"] = self.scenario.jobs
        self.history.how = "drained" if self.scenario.drains else "ok"
        self.history.__exit__(type(error), error, None)

    def dispatches(self, slot: int) -> Dispatch:
        self.history.lines.sent(self.s.holder(slot), slot, self.s.first(slot), self.s.jobs(slot), self.s.attempt(slot))
        return super().dispatches(slot)

    def answered(self, number: int, facts: tuple[int, int, int, int], verdict: str, expected: str) -> None:
        self.history.lines.result(VERDICTS.index(verdict), number, *facts)
        super().answered(number, facts, verdict, expected)

    def becomes(self, number: int, state: str) -> None:
        self.history.event(state, slave=number, how="simulated")
        super().becomes(number, state)

    def given_up(self, slot: int, alone: bool) -> str:
        why = super().given_up(slot, alone)
        if why == "failed":
            self._tell("given_up", slot)
        return why

    def ends(self, slot: int, how: str) -> None:
        super().ends(slot, how)
        if how == "apart":
            self._tell("apart", slot)
        elif how == "delivered":
            self.history.lines.delivered(self.s.first(slot), self.s.jobs(slot))
        else:
            for job in self.slots[slot].content:
                self.history.event("failed", index=job, slave=0, error="SlaveLost", died=None, attempts=[])

    def _tell(self, event: str, slot: int) -> None:
        self.history.event(event, first=self.s.first(slot), count=self.s.jobs(slot), strikes=self.s.strikes(slot))
