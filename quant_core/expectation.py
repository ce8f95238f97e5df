"""What quantizing a group of layers will cost, from what was measured on this model or on the most similar one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from .availability import ensure_available, ensure_runs, quiet_libraries
from .backend import Recipe
from .backends import backends, get_backend
from .errors import BackendUnavailable, DeviceUnsupported, SourceError, SpecError
from .groups import BY, LayerGroup
from .loading import LoadRequest
from .sensitivity_data import ComponentSensitivity, Sensitivity, shipped
from .source import PipelineIndex
from .specs import QuantSpec

_ROWS, _SIDE, _SEED = 64, 512, 0  # of the layer and the input that the noise of a scheme is measured on


def usable_specs(load: LoadRequest) -> list[QuantSpec]:
    """Every scheme with its defaults that runs on the device of a load and that an automatic plan may take."""
    dtype, device = getattr(torch, load.dtype), torch.device(load.device)
    found = []
    for backend in backends().values():
        for scheme in backend.schemes:
            needs_file = any(option.suffix and option.read_by(scheme.name) for option in backend.options)
            if scheme.avoid or needs_file:
                continue
            if _runs(f"{backend.name}/{scheme.name}", dtype, device):
                found.append(QuantSpec(backend.name, scheme.name, {}, ()))
    return found


@dataclass(frozen=True)
class Expectation:
    """The error that quantizing a group of a component as a spec will cause, as a squared error of pictures in 0..1.

    `source` says where it is from, `dtype` in which it was measured, `is_own` that it was on this very model.
    """

    groups: Callable[[nn.Module], list[LayerGroup]]
    measured: ComponentSensitivity
    source: str
    dtype: str
    is_own: bool

    def was_measured(self, group: str, spec: str) -> bool:
        """Whether the group was measured as that."""
        return group in self.measured.groups and spec in self.measured.groups[group].errors

    def error(self, group: str, spec: QuantSpec, dtype: torch.dtype, device: torch.device) -> float:
        """Of a group that was not measured, as of the worst one that was; of a scheme that was not, as of the one
        whose noise is nearest, in proportion to the noise."""
        known = self.measured.groups.get(group)
        if known is None or not known.errors:
            others = (name for name, part in self.measured.groups.items() if part.errors)
            return max(self.error(name, spec, dtype, device) for name in others)
        if str(spec) in known.errors:
            return known.errors[str(spec)]
        own = noise(str(spec), dtype, device)
        levels = {text: noise(text, dtype, device) for text in known.errors if _runs(text, dtype, device)}
        if not levels:
            return max(known.errors.values())
        nearest = min(levels, key=lambda text: abs(math.log(levels[text] / own)))
        return known.errors[nearest] * own / levels[nearest]


def expectation(name: str, model: nn.Module, index: PipelineIndex, given: Sensitivity | None) -> Expectation:
    """From the data that were given, else those shipped: of this component, of one of its class, or of one that does
    the same, a denoiser or a text encoder.

    Raises:
        SourceError: the data are empty.
    """
    reads_prompt = name in index.text_encoders

    def weights(group: LayerGroup) -> int:
        return sum(model.get_submodule(layer).weight.numel() for layer in group.layers)

    ranked = []
    for data in [given] if given else shipped():
        for other, part in data.components.items():
            if not any(group.errors for group in part.groups.values()):
                continue
            by = BY[str(data.settings["by"])]
            named = data.model == index.name if given else index.is_bundled
            is_own = (
                named
                and (data.pipeline, other) == (index.class_name, name)
                and all(
                    part.groups[group.name].patterns == group.patterns
                    and part.groups[group.name].parameters == weights(group)
                    for group in by(model)
                    if group.name in part.groups
                )
            )
            alike = other.startswith("text_encoder") == reads_prompt
            rank = (is_own, part.class_name == type(model).__name__, alike, other == name)
            ranked.append((rank, data, part))
    if not ranked:
        raise SourceError("The sensitivity data have no error of any group; give what the sensitivity command wrote.")
    rank, data, part = max(ranked, key=lambda found: found[0])
    source = f"{data.model}, {data.pictures} picture{'s' * (data.pictures != 1)}"
    return Expectation(BY[str(data.settings["by"])], part, source, str(data.settings.get("dtype")), rank[0])


@cache
def _runs(spec: str, dtype: torch.dtype, device: torch.device) -> bool:
    backend_name, _, scheme_name = spec.partition("/")
    try:
        backend = get_backend(backend_name)
        scheme = backend.scheme(scheme_name)
        ensure_available(backend, scheme)
        ensure_runs(backend, scheme, Recipe(scheme_name, backend.complete(scheme_name, {}), dtype, device))
    except (SpecError, BackendUnavailable, DeviceUnsupported):
        return False
    return True


@cache
def noise(spec: str, dtype: torch.dtype, device: torch.device) -> float:
    """The relative squared error of a layer with normal weights and normal inputs when it is quantized as that."""
    backend_name, _, scheme = spec.partition("/")
    known = QuantSpec(backend_name, scheme)
    backend, recipe = get_backend(known.backend), Recipe(known.scheme, known.options, dtype, device)
    generator = torch.Generator().manual_seed(_SEED)
    weight = torch.randn(_SIDE, _SIDE, generator=generator) / _SIDE**0.5
    inputs = torch.randn(_ROWS, _SIDE, generator=generator).to(device, dtype)
    with torch.inference_mode(False), torch.no_grad(), quiet_libraries():
        layer = nn.Linear(_SIDE, _SIDE, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        exact = layer(inputs).double()
        found = backend.quantize(layer, recipe)(inputs).double()
    return ((found - exact).square().sum() / exact.square().sum()).item()
