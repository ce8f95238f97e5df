"""Choosing one of several for each item, so that the least error comes with the fewest bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_MOST = 3000  # choices that are kept of a front; beyond that, neighbours in bytes are thinned out


class Choice(NamedTuple):
    """What was picked for each item, with the bytes and the error that it comes to."""

    bytes: int
    error: float
    picks: tuple[Any, ...]


def front(choices: Iterable[Choice]) -> list[Choice]:
    """Those that no other beats in both bytes and error, by bytes."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: choice[:2]):
        if not found or choice.error < found[-1].error:
            found.append(choice)
    return found


def combine(items: Sequence[Sequence[Choice]]) -> list[Choice]:
    """The front of all ways to take one choice of each item; bytes and errors add up.

    Exact as long as no front on the way has more than a few thousand choices.
    """
    best = [Choice(0, 0.0, ())]
    for item in items:
        sums = (
            Choice(one.bytes + other.bytes, one.error + other.error, one.picks + other.picks)
            for one in best
            for other in item
        )
        best = _thinned(front(sums))
    return best


def _thinned(choices: list[Choice]) -> list[Choice]:
    """The best choice of each of a few thousand equal spans of bytes, and so always the first and the last."""
    if len(choices) <= _MOST:
        return choices
    low, span = choices[0].bytes, (choices[-1].bytes - choices[0].bytes) / _MOST
    kept = {int((choice.bytes - low) / span): choice for choice in choices}  # later ones have less error
    return [choices[0], *(choice for choice in kept.values() if choice is not choices[0])]
