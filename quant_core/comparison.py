"""What plans cost in quality, measured: each against the 16-bit reference, from the same noise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from .errors import QuantError, SpecError
from .generation import Step, generate
from .inspection import count_parameters, footprint
from .loading import LoadRequest, load_pipeline
from .managing import on_device
from .metrics import mean_psnr, psnr, psnr_each, relative_error, ssim
from .notation import format_plan
from .pipeline import QuantizedPipeline
from .request import GenerateRequest
from .specs import QuantPlan
from .texts import cleaned

REFERENCE = "16 bit"
_LONGEST = 60  # characters of a label

OnProgress = Callable[[int, int, str], None]  # pictures done, of all, of which plan; at every step; raise to stop
Place = Callable[[QuantizedPipeline, str], QuantizedPipeline]  # a pipeline onto the device that computes


@dataclass(frozen=True)
class CompareRequest:
    """Which plans to compare, and on what.

    `load` names the pipeline, its dtype and device, without a plan. `plans` are labelled. Each prompt is painted once
    with each seed. `settings` are all else of a run: size, steps, guidance.

    Raises:
        SpecError: there is nothing to compare.
    """

    load: LoadRequest
    plans: Mapping[str, QuantPlan]
    prompts: Sequence[str]
    seeds: Sequence[int] = (0,)
    settings: GenerateRequest = GenerateRequest("")

    def __post_init__(self):
        if not self.plans or REFERENCE in self.plans:
            raise SpecError(
                f"Compare takes at least one plan, and none is called {REFERENCE!r}, which comes by itself."
            )
        object.__setattr__(self, "prompts", cleaned("prompts", tuple(self.prompts)))
        if not self.prompts or not self.seeds:
            raise SpecError("Compare takes at least one prompt and one seed.")
        if self.load.plan != QuantPlan():
            raise SpecError("The pipeline to compare on is named without a plan; give the plans as plans.")


def labelled(plans: Iterable[tuple[str, QuantPlan]]) -> dict[str, QuantPlan]:
    """Plans by the texts they were given as, each once; one with a long text by its number."""
    given = enumerate(dict(plans).items(), 1)
    return {text if len(text) <= _LONGEST else f"plan {number}": plan for number, (text, plan) in given}


@dataclass(frozen=True)
class ComparedPlan:
    """What a plan costs and brings. Lists are of the pictures in order: all seeds of the first prompt, and so on."""

    label: str
    plan: str  # as text
    psnr: float  # dB, the mean of the pictures', infinite if all are equal
    psnr_together: float  # dB, of the errors of all pictures together
    ssim: float  # 1 if all are equal
    psnr_each: tuple[float, ...]
    ssim_each: tuple[float, ...]
    latent_errors: tuple[float, ...]  # relative, after each step, as a mean; none where latents are not shown
    footprint: int  # bytes of all components as stored
    bytes_16bit: int
    peak: int | None  # bytes that the last picture held at most, where it can be measured
    seconds_per_step: float  # without the first of each picture
    load_seconds: float


@dataclass(frozen=True)
class Comparison:
    """The plans, the reference first, with their pictures (N, H, W, C) in 0..1 by label."""

    plans: tuple[ComparedPlan, ...]
    images: Mapping[str, torch.Tensor]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    notices: tuple[str, ...] = ()  # what must be told of the runs, each once


@dataclass(frozen=True)
class _Run:
    images: torch.Tensor
    latents: list[list[torch.Tensor]]  # of each picture, after each step
    footprint: int
    bytes_16bit: int
    peak: int | None
    seconds_per_step: float
    load_seconds: float
    notices: tuple[str, ...]


def compare(request: CompareRequest, on_progress: OnProgress | None = None, place: Place = on_device) -> Comparison:
    """Run the reference twice and each plan once, one pipeline in memory at a time.

    A host whose memory manager moves components gives a `place` of its own.

    Raises:
        SpecError, SourceError, BackendUnavailable, DeviceUnsupported: as `load_pipeline` and `generate` say.
        QuantError: the reference differs from itself, so that no distance from it would mean anything.
    """
    pictures = len(request.prompts) * len(request.seeds)
    done, total = 0, pictures * (len(request.plans) + 2)

    def tell(label: str, finished: int) -> None:
        nonlocal done
        done += finished
        if on_progress:
            on_progress(done, total, label)

    def runs(label: str, plan: QuantPlan, times: int) -> list[_Run]:
        return _runs(request, plan, times, lambda finished: tell(label, finished), place)

    reference, again = runs(REFERENCE, QuantPlan(), 2)
    check_equal(again.images, reference.images)
    found = [_compared(REFERENCE, QuantPlan(), again, reference)]
    images, notices = {REFERENCE: reference.images}, list(reference.notices)
    del again
    for label, plan in request.plans.items():
        (run,) = runs(label, plan, 1)
        found.append(_compared(label, plan, run, reference))
        images[label] = run.images
        notices += run.notices
    return Comparison(
        tuple(found), images, tuple(request.prompts), tuple(request.seeds), tuple(dict.fromkeys(notices))
    )


def check_equal(again: torch.Tensor, reference: torch.Tensor) -> None:
    """Check that the reference, run again, is equal to itself.

    Raises:
        QuantError: it is not.
    """
    if not torch.equal(again, reference):
        raise QuantError(
            f"The 16-bit reference differs from itself by {psnr(again, reference):.1f} dB PSNR from run to run; "
            "compare on a device or with settings where the same seed gives the same picture."
        )


def _runs(
    request: CompareRequest, plan: QuantPlan, times: int, tell: Callable[[int], None], place: Place
) -> list[_Run]:
    """All pictures, that many times, by a pipeline that is gone afterwards. `tell` gets the pictures finished now."""
    began = time.perf_counter()
    tell(0)
    pipeline = place(load_pipeline(replace(request.load, plan=plan), lambda *_: tell(0)), request.load.device)
    loaded = time.perf_counter() - began
    models = pipeline.models.values()
    sizes = sum(map(footprint, models)), 2 * sum(map(count_parameters, models))
    runs = []
    for _ in range(times):
        images, latents, seconds, notices = [], [], [], []
        for prompt in request.prompts:
            for seed in request.seeds:
                steps: list[torch.Tensor] = []
                times_of_steps: list[float] = []

                def on_step(step: Step, steps=steps, at=times_of_steps) -> None:
                    at.append(time.perf_counter())
                    tell(0)
                    if step.latents is not None:
                        steps.append(step.latents.detach().float().cpu())

                images.append(generate(pipeline, replace(request.settings, prompt=prompt, seed=seed), on_step))
                notices += pipeline.notices
                tell(1)
                latents.append(steps)
                seconds += [after - before for before, after in zip(times_of_steps, times_of_steps[1:], strict=False)]
        runs.append(
            _Run(
                torch.cat(images),
                latents,
                *sizes,
                pipeline.peak,
                fmean(seconds) if seconds else math.nan,
                loaded,
                tuple(notices),
            )
        )
        pipeline.memory.forget()
    return runs


def _compared(label: str, plan: QuantPlan, run: _Run, reference: _Run) -> ComparedPlan:
    pairs = list(zip(run.images.split(1), reference.images.split(1), strict=True))
    each = psnr_each(run.images, reference.images)
    steps = min(map(len, [*run.latents, *reference.latents]))
    errors = (
        fmean(
            relative_error(found[step], other[step])
            for found, other in zip(run.latents, reference.latents, strict=True)
        )
        for step in range(steps)
    )
    return ComparedPlan(
        label=label,
        plan=format_plan(plan),
        psnr=mean_psnr(each),
        psnr_together=psnr(run.images, reference.images),
        ssim=ssim(run.images, reference.images),
        psnr_each=each,
        ssim_each=tuple(ssim(*pair) for pair in pairs),
        latent_errors=tuple(errors),
        footprint=run.footprint,
        bytes_16bit=run.bytes_16bit,
        peak=run.peak,
        seconds_per_step=run.seconds_per_step,
        load_seconds=run.load_seconds,
    )
