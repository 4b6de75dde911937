"""What is simulated: sizes, faults and their rates. A seed names everything."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """One run. Times are in virtual seconds, one second being a job's mean duration."""

    seed: int
    slaves: int = 20
    jobs: int = 500
    grain: int = 3
    credit: int = 2
    max_attempts: int = 3
    read_ahead: int = 4
    delay: float = 0.1  # mean time that a message takes
    scarce: bool = False  # jobs come more slowly than the slaves could run them
    slow_user: bool = False  # the master releases a slot some time after its batch ended
    work_alone: bool = False  # the master works itself once all slaves are lost; else those that die are always started again
    gone_rate: float = 0.5  # chance that a slave that died is never started again, if work_alone
    # faults at any time: before a slave reports, while it is idle or computes, at the end
    kills: int = 0
    stops: int = 0  # SIGSTOP ... SIGCONT
    floods: int = 0  # a slave is suspected and taken on again many times within a moment
    flaps: int = 20  # how many times
    # faults at a batch or an answer
    death_rate: float = 0.02  # chance that a slave dies while it runs a batch
    stop_rate: float = 0.02  # chance that it is stopped
    doubt_rate: float = 0.02  # chance that the master gives up a live slave after an answer
    twice_rate: float = 0.02  # chance that an answer comes twice
    bogus_rate: float = 0.02  # chance that an answer follows one that is none
    mute_rate: float = 0.2  # chance that the answers on their way are lost with a slave that dies
    poison: int = 0  # jobs that make every slave fail that runs them
    hang_rate: float = 0.3  # chance that such a job makes it hang instead of die
    for_good: float = 0.2  # chance that a slave that was stopped never continues
    suspect_after: float = 1.5  # the master's patience with a silent slave
    lost_after: float = 5.0
    limits: int = 0  # how often the master changes the credit that is given out, in the middle of the run
    drains: bool = False  # ... at last to nothing: the run ends with what is in flight
    faults_until: float = 100.0  # then no more faults happen, but for those of poisonous jobs

    @property
    def only_poison(self) -> bool:
        """Whether nothing goes wrong but poisonous jobs: then the master can know which job did it."""
        rates = (self.death_rate, self.stop_rate, self.doubt_rate, self.kills, self.stops, self.floods)
        return self.poison > 0 and not any((*rates, self.mute_rate))

    @classmethod
    def random(cls, seed: int, **fixed: Any) -> Scenario:
        """A small scenario of random size, with some of the faults. Some have 200 slaves, and many have poison alone."""
        draw = random.Random(seed)
        one, choice = draw.random, draw.choice
        slaves = choice((1, 1, 2, 2, 3, 3, 4, 6, 10)) if one() < 0.995 else draw.randint(11, 200)
        jobs = draw.randint(1, 40) if one() < 0.95 else draw.randint(41, 200)
        drawn = cls(
            seed=seed,
            slaves=slaves,
            jobs=jobs,
            grain=choice((1, 1, 2, 3, 7)),
            credit=choice((1, 2, 2, 4)),
            max_attempts=choice((1, 2, 3, 3, 10)) if one() < 0.98 else 300,
            read_ahead=choice((0, 1, 4)),
            delay=choice((0.01, 0.1, 0.1, 3.0)),
            scarce=one() < 0.2,
            slow_user=one() < 0.3,
            work_alone=one() < 0.4,
            gone_rate=choice((0.2, 1.0)),
            suspect_after=choice((0.5, 1.5)),
            lost_after=choice((2.0, 5.0)),
            faults_until=choice((3.0, 20.0)),
            hang_rate=choice((0.0, 0.3, 1.0)),
            **cls._random_faults(draw),
            limits=choice((0, 0, 0, 1, 5)),
            drains=one() < 0.15,
        )
        return replace(drawn, **fixed)

    @staticmethod
    def _random_faults(draw: random.Random) -> dict[str, Any]:
        one, choice = draw.random, draw.choice
        rates = ("death_rate", "stop_rate", "doubt_rate", "twice_rate", "bogus_rate", "mute_rate")
        if one() < 0.15:
            return dict.fromkeys(rates, 0.0) | {"poison": choice((1, 1, 2, 5))}
        return {name: 0.0 if one() < 0.6 else choice((0.05, 0.4)) for name in rates} | {
            "kills": choice((0, 0, 1, 4)),
            "stops": choice((0, 0, 1, 4)),
            "floods": choice((0, 0, 0, 1, 2)),
            "flaps": 20 if one() < 0.97 else 300,
            "poison": choice((0, 0, 0, 1, 2)),
            "for_good": choice((0.0, 0.2, 0.6)),
        }
