"""The ways to quantize one component, schemes mixed between its groups of layers, and what each costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .backends import get_backend
from .expectation import Expectation
from .groups import FIRST, LAST, LayerGroup, plain_patterns
from .inspection import footprint
from .knapsack import Choice, combine, front
from .layers import linear_layers, match_modules, plan_layers, stored_sizes
from .skip_lists import with_patterns
from .specs import QuantSpec

PLAIN = ""  # in place of a scheme: left in 16 bit


@dataclass(frozen=True)
class Part:
    """A component that can be quantized, without its weights."""

    name: str
    model: nn.Module
    expected: Expectation
    groups: Sequence[LayerGroup]


@dataclass(frozen=True)
class Mixture:
    """One way to quantize a component: of a backend, the scheme of each group; no backend means 16 bit."""

    part: str
    backend: str
    schemes: Mapping[str, str]  # group -> scheme, or PLAIN

    @property
    def kind(self) -> tuple[str, str, frozenset[str]]:
        """What decides what it computes with: the component, the backend, the schemes."""
        return self.part, self.backend, frozenset(filter(None, self.schemes.values()))


def mixtures(part: Part, specs: Iterable[QuantSpec], dtype: torch.dtype, device: torch.device) -> list[Choice]:
    """16 bit, and for each scheme, and all of a backend that mixes them, the best ways for each number of bytes; the
    one pick of a choice is a `Mixture`."""
    plain = footprint(part.model)
    found = [Choice(plain, 0.0, (Mixture(part.name, "", {}),))]
    by_backend: dict[str, list[QuantSpec]] = {}
    for spec in specs:
        by_backend.setdefault(spec.backend, []).append(spec)
    for backend, own in by_backend.items():
        costs = {spec.scheme: costs_of_groups(part, spec, dtype, device) for spec in own}
        mixing = [[scheme] for scheme in costs]
        if get_backend(backend).mixes:
            mixing.append(list(costs))
        for schemes in mixing:
            items = [
                front(
                    [Choice(0, 0.0, (PLAIN,))]
                    + [
                        Choice(*costs[scheme][group.name], (scheme,))
                        for scheme in schemes
                        if group.name in costs[scheme]
                    ]
                )
                for group in part.groups
            ]
            names = [group.name for group in part.groups]
            for saved, error, picks in combine(items):
                if any(picks):
                    mixture = Mixture(part.name, backend, dict(zip(names, picks, strict=True)))
                    found.append(Choice(plain + saved, error, (mixture,)))
    return found


def costs_of_groups(
    part: Part, spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[int, float]]:
    """For each group that a spec reaches, the bytes it adds, which are less than none, and the expected error."""
    reached = plan_layers(part.model, spec, dtype, device, ()).layers
    stored = stored_sizes(part.model, reached, get_backend(spec.backend))
    weights = {name: layer.weight for name, layer in linear_layers(part.model)}
    found = {}
    for group in part.groups:
        if own := [layer for layer in group.layers if layer in reached]:
            plain = sum(weights[layer].numel() * weights[layer].element_size() for layer in own)
            added = sum(stored[layer] for layer in own) - plain
            found[group.name] = added, part.expected.error(group.name, spec, dtype, device)
    return found


def expected_error(part: Part, spec: QuantSpec, dtype: torch.dtype, device: torch.device) -> float:
    """What a spec is expected to cost; of a group that it reaches in part or by several schemes, each by its share."""
    full = with_patterns(spec, type(part.model).__name__)
    reached = plan_layers(part.model, full, dtype, device, ()).layers
    weights = {name: layer.weight.numel() for name, layer in linear_layers(part.model)}
    total = 0.0
    for group in part.groups:
        whole = sum(weights[layer] for layer in group.layers)
        for layer in group.layers:
            if layer in reached:
                alone = QuantSpec(spec.backend, reached[layer].scheme)
                total += part.expected.error(group.name, alone, dtype, device) * weights[layer] / whole
    return total


def whole(part: Part, spec: QuantSpec, dtype: torch.dtype, device: torch.device) -> Choice:
    """All that the spec reaches of a component quantized as that."""
    costs = costs_of_groups(part, spec, dtype, device)
    mixture = Mixture(
        part.name, spec.backend, {group.name: spec.scheme if group.name in costs else PLAIN for group in part.groups}
    )
    saved, error = (sum(cost[which] for cost in costs.values()) for which in (0, 1))
    return Choice(footprint(part.model) + saved, error, (mixture,))


def as_spec(part: Part, mixture: Mixture, dtype: torch.dtype, device: torch.device) -> QuantSpec | None:
    """The mixture as a spec, None if all stays in 16 bit. The scheme of most weights is the spec's own."""
    if not mixture.backend:
        return None
    weights = {name: layer.weight.numel() for name, layer in linear_layers(part.model)}
    sizes: Counter[str] = Counter()
    for group in part.groups:
        sizes[mixture.schemes[group.name]] += sum(weights[layer] for layer in group.layers)
    del sizes[PLAIN]
    base = sizes.most_common(1)[0][0]
    whole = {scheme: QuantSpec(mixture.backend, scheme, {}, ()) for scheme in sizes}
    reached = {scheme: plan_layers(part.model, spec, dtype, device, ()).layers for scheme, spec in whole.items()}
    ends = [group for group in part.groups if group.name in (FIRST, LAST)]
    # A pattern of a group inside all blocks also names the first and the last. In `mixed` these come before it, but
    # nothing comes before `skip`.
    stay = any(mixture.schemes[group.name] != PLAIN for group in ends)
    skip: list[str] = []
    mixed: dict[str, str] = {}
    for group in [*(group for group in part.groups if group not in ends), *ends]:
        scheme = mixture.schemes[group.name]
        if scheme == PLAIN:
            skip += plain_patterns(group, weights) if stay and group not in ends else group.patterns
        elif scheme != base or not match_modules(part.model, mixed).isdisjoint(group.layers):
            fitting = [name for name in group.patterns if match_modules(part.model, [name]) & reached[scheme].keys()]
            mixed = dict.fromkeys(fitting, scheme) | mixed
    return QuantSpec(mixture.backend, base, {}, tuple(skip), mixed)


def describe(mixture: Mixture) -> str:
    """As `gguf Q5_0, Q8_0 for attention, 16 bit for output`."""
    if not mixture.backend:
        return "16 bit"
    groups: dict[str, list[str]] = {}
    for group, scheme in mixture.schemes.items():
        groups.setdefault(scheme or "16 bit", []).append(group)
    most = max((scheme for scheme in groups if scheme != "16 bit"), key=lambda scheme: len(groups[scheme]))
    rest = (f"{scheme} for {_listed(names)}" for scheme, names in groups.items() if scheme != most)
    return ", ".join([f"{mixture.backend} {most}", *rest])


def _listed(names: list[str]) -> str:
    if len(names) > 6:
        return f"{len(names)} layers"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
