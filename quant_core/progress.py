"""How fast a run or a load goes, as one line of text."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """The steps of a run so far: `12/28, 1.43 steps/s, 11 s left`.

    The rate is that of the steps after the first, which also pays for what comes before it and for warming up.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.began = clock()
        self.done = self.total = 0
        self.first = self.last = (0, 0.0)  # (steps done, seconds) of the first and the last report

    def update(self, done: int, total: int) -> None:
        """Note that so many steps are done now."""
        begins = done <= self.done or not self.done  # the run, or a further stage of it
        self.done, self.total = done, total
        self.last = (done, self.clock() - self.began)
        if begins:
            self.first = self.last

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds, or None while there is but the first step."""
        steps, seconds = (self.last[part] - self.first[part] for part in (0, 1))
        return seconds / steps if steps > 0 and seconds > 0 else None

    def __str__(self) -> str:
        text = f"{self.done}/{self.total}"
        if self.seconds_per_step is None:
            return text
        left = self.seconds_per_step * (self.total - self.done)
        return f"{text}, {_rate(self.seconds_per_step)}, {duration(left)} left"

    @property
    def summary(self) -> str:
        """The whole run: `28 steps in 21 s, 1.43 steps/s`; its seconds begin where this object does."""
        rate = f", {_rate(self.seconds_per_step)}" if self.seconds_per_step else ""
        return f"{self.done} step{'s' * (self.done != 1)} in {duration(self.last[1])}{rate}"


def _rate(seconds_per_step: float) -> str:
    if seconds_per_step > 1:
        return f"{seconds_per_step:.2f} s/step"
    return f"{1 / seconds_per_step:.2f} steps/s"


def duration(seconds: float) -> str:
    """`0.4 s`, `11 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def bytes_done(done: int, total: int) -> str:
    """`3.1 of 23.8 GB`, in units of 1000 as disks are sold."""
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / unit:.1f} of {total / unit:.1f} {name}"
