"""How far a load or a run is, as one line on stderr."""

from __future__ import annotations

import sys

from .. import Pace, Step, bytes_done


class ProgressLine:
    """A line on stderr that rewrites itself, on a terminal only, and is wiped when its `with` block ends."""

    def __init__(self, what: str):
        self.what = what
        self.shown = sys.stderr.isatty()
        self.pace = Pace()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_) -> None:
        if self.shown:
            print("\r" + " " * 84 + "\r", end="", file=sys.stderr, flush=True)

    def load(self, done: int, total: int, name: str) -> None:
        """Show so many bytes of a load, which is at that component; an `on_progress` of `load_pipeline`."""
        self.show(done, total, f"{bytes_done(done, total)} {name}")

    def step(self, step: Step) -> None:
        """Show a step of a run; an `on_step` of `generate`."""
        self.pace.update(step.done, step.total)
        self.show(step.done, step.total, str(self.pace))

    def show(self, done: int, total: int, text: str) -> None:
        """Show a share and a text."""
        if self.shown:
            filled = 24 * done // max(total, 1)
            bar = "#" * filled + "." * (24 - filled)
            print(f"\r{self.what} [{bar}] {text:<44}", end="", file=sys.stderr, flush=True)
