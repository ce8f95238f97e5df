"""What has to fit into a budget, and which ways to quantize do."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from .estimate import Estimate
from .knapsack import Choice, combine

FITS = {
    "in turn": "with only the component in use on the device",
    "together": "with all components on the device",
    "weights": "of weights",
}


class Room:
    """A budget of bytes, what of a pipeline has to fit into it, and the ways to quantize that do with the least error.

    `found` is an estimate of the pipeline in 16 bit, and `parts` are the components that can be quantized.
    """

    def __init__(self, budget: int, fits: str, found: Estimate, parts: Container[str]):
        self.budget, self.fits = budget, fits
        self.activations = {part.name: part.activations for part in found.components}
        self.fixed = sum(part.footprint for part in found.components if part.name not in parts)

    def choose(self, ways: Mapping[str, Sequence[Choice]]) -> dict[str, Choice]:
        """One way for each component; where nothing fits, the smallest."""
        if self.fits == "in turn":
            return {name: _best(found, self.budget - self.activations[name]) for name, found in ways.items()}
        whole = _best(combine(list(ways.values())), self.shared)
        by_name = {pick.part: pick for pick in whole.picks}
        return {name: next(way for way in found if way.picks[0] is by_name[name]) for name, found in ways.items()}

    @property
    def shared(self) -> int:
        """Bytes that all components to quantize may take at once."""
        return self.budget - self.fixed - (max(self.activations.values()) if self.fits == "together" else 0)

    def has(self, sizes: Mapping[str, int]) -> bool:
        """Whether components of these sizes fit."""
        if self.fits == "in turn":
            return all(size + self.activations[name] <= self.budget for name, size in sizes.items())
        return sum(sizes.values()) <= self.shared

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

    def learn(self, found: Estimate) -> None:
        """A quantized component computes with more than its weights as they were."""
        for part in found.components:
            self.activations[part.name] = max(self.activations[part.name], part.activations)


def _best(ways: Sequence[Choice], most: int) -> Choice:
    """The last that fits, which has the least error, or else the smallest."""
    return next((way for way in reversed(ways) if way.bytes <= most), ways[0])
