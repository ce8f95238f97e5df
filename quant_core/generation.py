"""From a prompt to images, through any diffusers pipeline, called as an unquantized one is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .allocator import forget_cached, let_go
from .arrays import arrays_of
from .cut_texts import watching
from .errors import QuantError
from .inspection import footprint
from .optimization import check_eager, optimized
from .peak import measured
from .pipeline import QuantizedPipeline
from .refusals import explained, is_foreign
from .request import GenerateRequest, call_arguments
from .results import found_in, notices_of_result, pictures
from .seeding import seeded
from .sending import send
from .sizes import keeping_size, notices_of_size
from .texts import notices_of_syntax, texts_of
from .tiling import tiled
from .unchanged import unchanged


@dataclass(frozen=True)
class Step:
    """What a run has come to: steps done, steps in all, and the latents as the pipeline has them after this step,
    on its device; None of a pipeline that shows none."""

    done: int
    total: int
    latents: torch.Tensor | None = None


OnStep = Callable[[Step], None]  # raise to stop


def generate(pipeline: QuantizedPipeline, request: GenerateRequest, on_step: OnStep | None = None) -> torch.Tensor:
    """Run the pipeline.

    Returns images as (N, H, W, C) floats in 0..1 on the CPU, of a video pipeline all frames in order; or latents as
    the pipeline leaves them. What `on_step` raises stops the run at once, and the pipeline can be used again. What a
    user must be told of the run is in `pipeline.notices` afterwards.

    Raises:
        SpecError: the pipeline takes no such argument, it would have no effect, or the pipeline refuses it.
        BackendUnavailable: the pipeline needs a package that is not installed.
        QuantError: the pipeline fails, makes no picture, or is running already.
    """
    if not pipeline.running.acquire(blocking=False):
        raise QuantError(f"{pipeline.title} is running already; wait for that run, or load the pipeline once more.")
    try:
        return _generate(pipeline, request, on_step)
    finally:
        pipeline.running.release()


def _generate(pipeline: QuantizedPipeline, request: GenerateRequest, on_step: OnStep | None) -> torch.Tensor:
    pipeline.notices = []
    arguments = call_arguments(pipeline, request)
    is_told = pipeline.placements or pipeline.optimization
    check_eager(pipeline, pipeline.device if is_told else pipeline.pipe._execution_device)
    begun, own = [], []
    pipeline.begin(request)
    pipeline.memory.enabled = request.remember
    try:
        # Not in the inference mode a host may have on, in which quanto's 4-bit and 2-bit tensors cannot be used.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            tiled(pipeline, request),
            _reporting(pipeline.pipe, arguments, _noting(on_step, own), begun),
            watching(pipeline.pipe, arguments) as readings,
            keeping_size(pipeline.pipe, arguments),
            optimized(pipeline, arguments),
            unchanged(pipeline.pipe, pipeline.placements.values()),
            seeded(request.seed, device := pipeline.pipe._execution_device),
            arrays_of(arguments),
        ):
            there = _weights_on(device, pipeline)
            with measured(device, is_first=pipeline.last is None) as peak:
                result = pipeline.pipe(**arguments)
        pipeline.last, pipeline.peak = request, None if peak.extra is None else there + peak.extra
        pipeline.peak_meaning = peak.meaning
    except BaseException as error:
        let_go(error)
        if own or not is_foreign(error):
            raise
        raise explained(error, pipeline.index.class_name, begun[-1] if begun else 0) from error
    else:
        found = found_in(result, pipeline.index.class_name)
        receive = send(found.detach()) if request.output == "latents" else send(*pictures(found))
    finally:
        for module in pipeline.models.values():
            forget_cached(module.modules())
    images, *is_finite = receive()
    if is_finite and not is_finite[0]:
        raise QuantError(
            "The pipeline made no picture but NaN; lower its guidance, or load it in bfloat16 or float32."
        )
    pipeline.notices += [*notices_of_syntax(texts_of(arguments)), *readings.notices(pipeline.pipe)]
    if request.output == "images":
        name = pipeline.index.class_name
        pipeline.notices += [*notices_of_size(images, name, arguments), *notices_of_result(result, images, name)]
    return images


def _noting(on_step: OnStep | None, errors: list[BaseException]) -> OnStep | None:
    """The callback; what it raises is kept, to be told from a library's own."""

    def call(step: Step) -> None:
        try:
            on_step(step)
        except BaseException as error:
            errors.append(error)
            raise

    return call if on_step else None


def _weights_on(device: torch.device, pipeline: QuantizedPipeline) -> int:
    """Bytes of the pipeline's weights on the device that computes."""
    offload = pipeline.optimization and pipeline.optimization.offload
    if device.type != "cpu" and offload and offload.way != "managed":
        return 0  # they come and go, which is measured
    if not pipeline.placements:
        return sum(map(footprint, pipeline.models.values()))
    return sum(part.size if device.type == "cpu" else part.resident for part in pipeline.placements.values())


@contextmanager
def _reporting(pipe: Any, arguments: dict[str, Any], on_step: OnStep | None, begun: list) -> Iterator[None]:
    """Call `on_step` after each denoising step, by the pipeline's callback or, where it has none, its progress bar.

    `begun` is filled by the first step.
    """

    def report(done: int, total: int, latents: torch.Tensor | None = None) -> None:
        begun.append(done)
        if on_step:
            on_step(Step(done, total, latents))

    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:

        def at_end(pipe, step, timestep, state):
            total = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
            latents = state.get("latents")
            report(step + 1, total, latents if isinstance(latents, torch.Tensor) else None)
            return state

        arguments["callback_on_step_end"] = at_end
        yield
    else:
        pipe.progress_bar = lambda iterable=None, total=None: _Bar(iterable, total, report)
        try:
            yield
        finally:
            del pipe.progress_bar


class _Bar:
    """What a pipeline expects of tqdm."""

    def __init__(self, iterable, total, on_step):
        self.iterable = iterable
        self.total = total if total is not None else len(iterable)
        self.on_step = on_step
        self.done = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()

    def update(self, count=1):
        self.done += count
        self.on_step(self.done, self.total)

    def set_postfix(self, *args, **kwargs):
        """Nothing to show."""

    set_description = set_postfix
