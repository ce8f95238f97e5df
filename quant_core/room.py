"""What has to fit into a budget, and which ways to quantize do."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from .estimate import Estimate
from .knapsack import Choice, combine, front

FITS = {
    "in turn": "with only the component in use on the device",
    "together": "with all components on the device",
    "weights": "of weights",
}


class Room:
    """A budget of bytes, what of a pipeline has to fit into it, and the ways to quantize that do with the least error.

    `found` is an estimate of the pipeline in 16 bit, and `parts` are the components that can be quantized. What a way
    of quantizing computes with is taken for what 16 bit does until an estimate says more.
    """

    def __init__(self, budget: int, fits: str, found: Estimate, parts: Container[str]):
        self.budget, self.fits = budget, fits
        self._plain = {part.name: part.activations for part in found.components}
        self._fixed = sum(part.footprint for part in found.components if part.name not in parts)
        self._least = max((part.activations for part in found.components if part.name not in parts), default=0)
        self._known: dict[tuple, int] = {}  # kind of mixture -> bytes

    def choose(self, ways: Mapping[str, Sequence[Choice]]) -> dict[str, Choice]:
        """One way for each component, with the least error of those that fit; where nothing does, the smallest."""
        if self.fits == "in turn":
            return {name: self._alone(found) for name, found in ways.items()}
        if self.fits == "weights":
            return _together(ways, self.budget - self._fixed)
        limits = {max(self._computes(way), self._least) for found in ways.values() for way in found}
        tried = [_together(self._within(ways, limit), self.budget - self._fixed - limit) for limit in sorted(limits)]
        fitting = [found for found in tried if found and self.has(found)]
        return min(fitting, key=_error) if fitting else min(filter(None, tried), key=self._sum)

    def _alone(self, ways: Sequence[Choice]) -> Choice:
        fitting = [way for way in ways if way.bytes + self._computes(way) <= self.budget]
        if fitting:
            return min(fitting, key=lambda way: (way.error, way.bytes))
        return min(ways, key=lambda way: way.bytes + self._computes(way))

    def _within(self, ways: Mapping[str, Sequence[Choice]], limit: int) -> dict[str, list[Choice]]:
        return {name: [way for way in found if self._computes(way) <= limit] for name, found in ways.items()}

    def _sum(self, picked: Mapping[str, Choice]) -> float:
        if not picked:
            return math.inf
        computes = max(self._least, *map(self._computes, picked.values()))
        return self._fixed + sum(way.bytes for way in picked.values()) + computes

    def _computes(self, way: Choice) -> int:
        (mixture,) = way.picks
        return self._known.get(mixture.kind, self._plain[mixture.part])

    def has(self, picked: Mapping[str, Choice]) -> bool:
        """Whether these ways fit, as far as is known of what they compute with."""
        match self.fits:
            case "in turn":
                return all(way.bytes + self._computes(way) <= self.budget for way in picked.values())
            case "together":
                return self._sum(picked) <= self.budget
        return self._fixed + sum(way.bytes for way in picked.values()) <= self.budget

    def taken(self, found: Estimate) -> int:
        """Bytes of what has to fit."""
        match self.fits:
            case "in turn":
                return found.peak_in_turn
            case "together":
                return found.peak_resident
        return sum(part.footprint for part in found.components)

    def where(self, found: Estimate) -> str:
        """Which component takes the most, where that decides."""
        most = max(found.components, key=lambda part: part.footprint + part.activations)
        return f" in its {most.name}" if self.fits == "in turn" else ""

    def learn(self, picked: Mapping[str, Choice], found: Estimate) -> bool:
        """What the ways that were picked compute with, by an estimate of that plan; whether that is news."""
        activations = {part.name: part.activations for part in found.components}
        news = False
        for name, way in picked.items():
            if activations[name] > self._computes(way):
                self._known[way.picks[0].kind] = activations[name]
                news = True
        return news


def _together(ways: Mapping[str, Sequence[Choice]], most: int) -> dict[str, Choice]:
    """Ways that add up to no more bytes than that with the least error, or else the fewest bytes; none if a component
    has no way."""
    if not all(ways.values()):
        return {}
    sums = combine([front(found) for found in ways.values()])
    whole = next((way for way in reversed(sums) if way.bytes <= most), sums[0])
    by_name = {pick.part: pick for pick in whole.picks}
    return {name: next(way for way in found if way.picks[0] is by_name[name]) for name, found in ways.items()}


def _error(picked: Mapping[str, Choice]) -> float:
    return sum(way.error for way in picked.values())
