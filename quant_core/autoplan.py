"""The plan with the least expected error that fits into a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .comparison_report import decibels
from .errors import SpecError, choices, gib
from .estimate import Estimate, estimate, estimate_data
from .expectation import expectation, usable_specs
from .hollow import hollow_models
from .knapsack import Choice
from .loading import LoadRequest
from .metrics import psnr_of
from .mixtures import Part, describe, expected_error, mixtures, spec_of, whole
from .notation import format_plan
from .planning import check_plan
from .request import GenerateRequest
from .room import FITS, Room
from .sensitivity_data import Sensitivity
from .source import PipelineIndex, find_folder, read_index
from .specs import QuantPlan

_ROUNDS = 4  # in which what the plan itself computes with is taken into account


@dataclass(frozen=True)
class AutoPlanRequest:
    """For which pipeline and which run a plan is wanted, and the bytes it may take.

    `load` names the pipeline without a plan. `fits` says what has to fit: `in turn` the component in use with what it
    computes, `together` all components with that, `weights` the stored weights alone. `sensitivity` is data of the
    user's own, in place of those that are shipped.

    Raises:
        SpecError: a setting is none.
    """

    load: LoadRequest
    run: GenerateRequest
    budget: int
    fits: str = "in turn"
    sensitivity: Sensitivity | None = None

    def __post_init__(self):
        if self.fits not in FITS:
            raise SpecError(f"fits is {self.fits!r}; use one of: {choices(FITS)}.")
        if self.budget <= 0:
            raise SpecError(f"The budget is {self.budget} bytes; it takes at least 1.")
        if self.load.plan != QuantPlan():
            raise SpecError("An automatic plan is for a pipeline without one; leave the plan out.")


@dataclass(frozen=True)
class AutoPlan:
    """The plan, what it is estimated to take, and why it is this one."""

    plan: QuantPlan
    estimate: Estimate
    taken: int  # bytes of what has to fit
    expected_error: float  # squared error of pictures in 0..1, 0 for 16 bit
    is_own: bool  # whether all of that was measured on this very model
    reasons: tuple[str, str, str]

    @property
    def footprint(self) -> int:
        """Bytes of all weights as stored."""
        return sum(part.footprint for part in self.estimate.components)


def auto_plan(request: AutoPlanRequest) -> AutoPlan:
    """Find the plan. Nothing is loaded.

    Raises:
        SpecError, SourceError: as `load_pipeline` and `generate` say.
        SpecError: no plan fits, or the pipeline has nothing to quantize.
    """
    load = request.load
    folder = find_folder(
        str(load.source), allow_download=load.allow_download, revision=load.revision, variant=load.variant
    )
    index, dtype, device = read_index(folder), getattr(torch, load.dtype), torch.device(load.device)
    found = estimate(load, request.run)
    parts = _parts(index, dtype, request.sensitivity)
    specs = usable_specs(load)
    ways = {name: mixtures(part, specs, dtype, device) for name, part in parts.items()}
    uniform = {str(spec): {name: whole(part, spec, dtype, device) for name, part in parts.items()} for spec in specs}
    room = Room(request.budget, request.fits, found, parts)
    for _ in range(_ROUNDS):
        picked = room.choose(ways)
        mixed = {name: spec_of(parts[name], choice.picks[0]) for name, choice in picked.items()}
        plan = QuantPlan({name: spec for name, spec in mixed.items() if spec})
        found = estimate(replace(load, plan=plan), request.run)
        if room.taken(found) <= request.budget:
            error = sum(choice.error for choice in picked.values())
            reasons = (_size(room, found), _choice(picked), _quality(parts, error, room, uniform))
            is_own = all(part.expected.is_own for part in parts.values())
            return AutoPlan(plan, found, room.taken(found), error, is_own, reasons)
        room.learn(found)
    raise SpecError(
        f"No plan fits into {gib(request.budget)} {FITS[request.fits]}: the least that was found takes "
        f"{gib(room.taken(found))}{room.where(found)}; give that much, a smaller size, or load a plan that is "
        "streamed block by block."
    )


def expected_psnr(load: LoadRequest, sensitivity: Sensitivity | None = None) -> float:
    """The mean PSNR in dB to 16 bit that a plan is expected to have, by data as `AutoPlanRequest` has them.

    Raises:
        SpecError, SourceError, BackendUnavailable, DeviceUnsupported: as `load_pipeline` says.
    """
    folder = find_folder(
        str(load.source), allow_download=load.allow_download, revision=load.revision, variant=load.variant
    )
    index, dtype, device = read_index(folder), getattr(torch, load.dtype), torch.device(load.device)
    specs = check_plan(load.plan, index, dtype, device, load.variant).specs
    parts = _parts(index, dtype, sensitivity)
    return psnr_of(sum(expected_error(parts[name], spec, dtype, device) for name, spec in specs.items()))


def _parts(index: PipelineIndex, dtype: torch.dtype, sensitivity: Sensitivity | None) -> dict[str, Part]:
    """The components that can be quantized.

    Raises:
        SpecError: there is none.
    """
    models, parts = hollow_models(index, dtype), {}
    for name in index.default_reach:
        if not index.models[name].prequantized:
            expected = expectation(name, type(models[name]).__name__, index, sensitivity)
            parts[name] = Part(name, models[name], expected, expected.groups(models[name]))
    if not parts:
        raise SpecError(f"{index.name} has no component that could be quantized; load it as it is.")
    return parts


def _size(room: Room, found: Estimate) -> str:
    stored, full = (sum(getattr(part, key) for part in found.components) for key in ("footprint", "bytes_16bit"))
    return (
        f"It takes {gib(room.taken(found))} of {gib(room.budget)} {FITS[room.fits]}; the weights are {gib(stored)}, "
        f"{stored / full:.0%} of 16 bit."
    )


def _choice(picked: Mapping[str, Choice]) -> str:
    return "; ".join(f"{name}: {describe(choice.picks[0])}" for name, choice in picked.items()) + "."


def _quality(parts: Mapping[str, Part], error: float, room: Room, uniform: Mapping[str, Mapping[str, Choice]]) -> str:
    if not error:
        return "It is equal to 16 bit, which fits."
    fitting = {
        spec: sum(choice.error for choice in whole.values())
        for spec, whole in uniform.items()
        if room.has({name: choice.bytes for name, choice in whole.items()})
    }
    best = min(fitting, key=lambda spec: fitting[spec], default=None)
    sources = ", ".join(dict.fromkeys(part.expected.source for part in parts.values()))
    rival = f"the best uniform plan that fits, {best}" if best else "any uniform plan, of which none fits"
    if not all(part.expected.is_own for part in parts.values()):
        return (
            f"Expected nearer to 16 bit than {rival}; measured on {sources}, another model, so only the order counts."
        )
    against = f"{decibels(psnr_of(fitting[best]))} dB of {rival}" if best else rival
    return f"Expected PSNR to 16 bit {decibels(psnr_of(error))} dB, against {against}; measured on {sources}."


def format_auto_plan(found: AutoPlan) -> str:
    """The plan as text, and below it why it is this one."""
    return "\n".join([format_plan(found.plan), *found.reasons])


def auto_plan_data(found: AutoPlan) -> dict[str, Any]:
    """The same as plain data for JSON, with the plan as `QuantPlan.from_dict` and as `parse_plan` read it, and its
    estimate."""
    psnr = psnr_of(found.expected_error)
    return {
        "plan": found.plan.to_dict(),
        "text": format_plan(found.plan),
        "taken": found.taken,
        "footprint": found.footprint,
        "expected_psnr": psnr if math.isfinite(psnr) else None,
        "measured_on_this_model": found.is_own,
        "reasons": list(found.reasons),
        "estimate": estimate_data(found.estimate),
    }
