"""From a prompt to images, through any diffusers pipeline, called as an unquantized one is."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any, Union, get_args, get_origin

import torch

from .allocator import forget_cached, let_go
from .errors import QuantError, SpecError, choices, did_you_mean, one_sentence
from .inspection import footprint
from .peak import measured
from .pipeline import QuantizedPipeline

OUTPUTS = ("images", "latents")
_OURS = {  # our word -> the pipelines' word
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "images_per_prompt": "num_images_per_prompt",
    "max_sequence_length": "max_sequence_length",
}
_MOST = {"width": 16384, "height": 16384, "steps": 10000, "images_per_prompt": 64, "max_sequence_length": 8192}
_RESERVED = {
    *("generator", "output_type", "return_dict"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback", "callback_steps"),
}


@dataclass(frozen=True)
class Step:
    """What a run has come to: steps done, steps in all, and the latents as the pipeline has them after this step,
    on its device; None of a pipeline that shows none."""

    done: int
    total: int
    latents: torch.Tensor | None = None


OnStep = Callable[[Step], None]  # raise to stop


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate. None leaves the pipeline's own default; `extra` is further arguments of its `__call__`.

    `remember` lets text encoders answer from memory what they have answered before, with the same bits.

    With a `true_cfg_scale` above 1 among them and no negative prompt, the negative prompt is the empty one.

    Width and height are in pixels. The seed is of a generator on the CPU, so its noise is the same on every device.

    Raises:
        SpecError: a value is out of its range or has another name here.
    """

    prompt: str | list[str]
    negative_prompt: str | list[str] | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    images_per_prompt: int | None = None
    max_sequence_length: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    output: str = "images"
    remember: bool = True

    def __post_init__(self):
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise SpecError(f"{name} is {value!r}; it takes a whole number from 1 to {most}.")
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise SpecError(f"prompt is {self.prompt!r}; it takes a text or a list of texts.")
        if self.guidance is not None and not (type(self.guidance) in (int, float) and 0 <= self.guidance < math.inf):
            raise SpecError(f"guidance is {self.guidance!r}; it takes a number of at least 0.")
        if type(self.seed) is not int or not 0 <= self.seed < 2**64:
            raise SpecError(f"seed is {self.seed!r}; it takes a whole number from 0 to 2**64 - 1.")
        if self.output not in OUTPUTS:
            raise SpecError(f"output is {self.output!r}; use one of: {choices(OUTPUTS)}.")
        renamed = {theirs: ours for ours, theirs in _OURS.items() if theirs != ours}
        for name in self.extra:
            if name in _RESERVED:
                raise SpecError(f"{name} is set by the engine and cannot be given.")
            if isinstance(self.extra[name], float) and not math.isfinite(self.extra[name]):
                raise SpecError(f"{name} is {self.extra[name]}; it takes a finite number.")
            if name in ("sigmas", "timesteps") and not _is_numbers(self.extra[name]):
                raise SpecError(f"{name} is {self.extra[name]!r}; it takes a list of finite numbers.")
            if name in ("sigmas", "timesteps") and (not self.extra[name] or self.steps):
                raise SpecError(f"{name} says how many steps there are; give at least one, and no steps beside it.")
            if name in _OURS or name in renamed:
                raise SpecError(f"{name} cannot be an extra argument; give it as {renamed.get(name, name)}.")
        object.__setattr__(self, "extra", MappingProxyType(dict(self.extra)))


def generate(pipeline: QuantizedPipeline, request: GenerateRequest, on_step: OnStep | None = None) -> torch.Tensor:
    """Run the pipeline.

    Returns images as (N, H, W, C) floats in 0..1 on the CPU, of a video pipeline all frames in order; or latents as
    the pipeline leaves them. What `on_step` raises stops the run at once, and the pipeline can be used again.

    Raises:
        SpecError: the pipeline takes no such argument, or it would have no effect.
    """
    arguments = call_arguments(pipeline, request)
    begun = []
    pipeline.begin(request)
    pipeline.memory.enabled = request.remember
    changing = filter(None, (pipeline.pipe, getattr(pipeline.pipe, "scheduler", None)))
    state = [
        (vars(part), {name: list(value) if type(value) is list else value for name, value in vars(part).items()})
        for part in changing  # lists too: some schedulers fill one from run to run
    ]
    try:
        # Not in the inference mode a host may have on, in which quanto's 4-bit and 2-bit tensors cannot be used.
        with torch.inference_mode(False), torch.no_grad(), _reporting(pipeline.pipe, arguments, on_step, begun):
            device = pipeline.pipe._execution_device
            there = _weights_on(device, pipeline)
            with measured(device, is_first=pipeline.last is None) as peak:
                result = pipeline.pipe(**arguments)
        pipeline.last, pipeline.peak = request, None if peak.extra is None else there + peak.extra
        pipeline.peak_meaning = peak.meaning
    except BaseException as error:
        let_go(error)
        if begun or not isinstance(error, (TypeError, ValueError)):
            raise
        raise SpecError(f"{pipeline.index.class_name} refuses the request: {one_sentence(error)}.") from error
    finally:
        _clean_up(pipeline, state)
    found = getattr(result, "images", None)
    if found is None:
        found = getattr(result, "frames", None)
    if found is None:
        raise SpecError(f"{pipeline.index.class_name} makes neither images nor video but {type(result).__name__}.")
    return found.detach().cpu() if request.output == "latents" else _images(found)


def _weights_on(device: torch.device, pipeline: QuantizedPipeline) -> int:
    """Bytes of the pipeline's weights on the device that computes."""
    if not pipeline.placements:
        return sum(map(footprint, pipeline.models.values()))
    return sum(part.size if device.type == "cpu" else part.resident for part in pipeline.placements.values())


def _clean_up(pipeline: QuantizedPipeline, state: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Leave nothing of a run in the pipeline, however it ended: tensors in it and its scheduler, features of earlier
    frames in a video VAE, streamed blocks on the device, and the registry of hooks that diffusers puts on a denoiser.
    That holds the denoiser: a cycle, so that dropping the pipeline would free its weights only when the garbage
    collector comes by."""
    for now, before in state:
        now.clear()
        now.update(before)
    for placement in pipeline.placements.values():
        placement.settle()
    for module in pipeline.models.values():
        forget_cached(module.modules())
        if callable(clear := getattr(module, "clear_cache", None)):
            clear()
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and not registry.hooks:
            del module._diffusers_hook


def call_arguments(pipeline: QuantizedPipeline, request: GenerateRequest) -> dict[str, Any]:
    """What the pipeline is called with for a request.

    Raises:
        SpecError: the pipeline takes no such argument, or it would have no effect.
    """
    name = pipeline.index.class_name
    accepted = inspect.signature(type(pipeline.pipe).__call__).parameters
    arguments = {theirs: getattr(request, ours) for ours, theirs in _OURS.items()}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    for key in [*arguments, *request.extra]:
        if key not in accepted:
            ours = next((ours for ours, theirs in _OURS.items() if theirs == key), key)
            hint = did_you_mean(key, accepted)
            usable = choices(accepted.keys() - _RESERVED - {"self", "args", "kwargs"})
            raise SpecError(f"{name} takes no {ours}{hint}; it takes: {usable}.")
    _check_types(name, request.extra, accepted)
    arguments |= request.extra
    if (
        _number(arguments.get("true_cfg_scale")) > 1
        and not {"negative_prompt", "negative_prompt_embeds"} & arguments.keys()
    ):
        arguments["negative_prompt"] = ""  # what pipelines that guide by guidance_scale contrast with, too
    _check_effect(pipeline, arguments, accepted)
    _check_size(pipeline, arguments)
    arguments["generator"] = torch.Generator("cpu").manual_seed(request.seed)
    # Pipelines without a processor hand over "pt" as the decoder leaves it, in -1..1, but "np" in 0..1.
    processed = hasattr(pipeline.pipe, "image_processor") or hasattr(pipeline.pipe, "video_processor")
    arguments["output_type"] = "latent" if request.output == "latents" else "pt" if processed else "np"
    return arguments


def _check_effect(pipeline: QuantizedPipeline, arguments: dict[str, Any], accepted: Mapping[str, Any]) -> None:
    """Refuse what these pipelines would ignore without a word."""
    name = pipeline.index.class_name
    negative = any(key.startswith("negative_prompt") and value is not None for key, value in arguments.items())
    knob = "true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"
    if knob in accepted and "negative_prompt" in accepted:
        scale = arguments.get(knob, accepted[knob].default)
        if negative and isinstance(scale, (int, float)) and scale <= 1:
            word = "guidance" if knob == "guidance_scale" else knob
            raise SpecError(f"{name} ignores negative_prompt while {word} is {scale}; set {word} above 1.")
    denoiser = getattr(pipeline.pipe, "transformer", None)
    embeds = getattr(getattr(denoiser, "config", None), "guidance_embeds", True)
    if _number(arguments.get("guidance_scale")) > 1 and not embeds and "true_cfg_scale" in accepted:
        raise SpecError(
            f"This {type(denoiser).__name__} ignores guidance (guidance_embeds is false); set true_cfg_scale instead."
        )


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, Real) and not isinstance(item, bool) and math.isfinite(item) for item in value
    )


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 0.0


def _check_types(name: str, arguments: Mapping[str, Any], accepted: Mapping[str, inspect.Parameter]) -> None:
    """Refuse a further argument that is not of the type the pipeline's signature names, where it names plain ones."""
    for key, value in arguments.items():
        allowed = _types(accepted[key].annotation)
        if allowed and not isinstance(value, allowed):
            wanted = " or ".join(sorted(kind.__name__ for kind in set(allowed) - {type(None)}))
            raise SpecError(f"{key} is {value!r}; {name} takes {wanted} there.")


def _types(annotation: Any) -> tuple[type, ...]:
    """The classes that an annotation allows, none if it cannot be told."""
    if isinstance(annotation, (types.UnionType,)) or get_origin(annotation) is Union:
        parts = [_types(part) for part in get_args(annotation)]
        return tuple(kind for part in parts for kind in part) if all(parts) else ()
    kind = get_origin(annotation) or annotation
    if not isinstance(kind, type) or kind is inspect.Parameter.empty:
        return ()
    return {float: (float, int), tuple: (tuple, list)}.get(kind, (kind,))


def _check_size(pipeline: QuantizedPipeline, arguments: dict[str, Any]) -> None:
    """Refuse a size that the pipeline would round without a word."""
    processor = getattr(pipeline.pipe, "image_processor", None) or getattr(pipeline.pipe, "video_processor", None)
    multiple = getattr(getattr(processor, "config", None), "vae_scale_factor", 1)
    for name in ("width", "height"):
        if (value := arguments.get(name, 0)) % multiple:
            below = value // multiple * multiple
            near = " or ".join(str(side) for side in (below, below + multiple) if side)
            raise SpecError(f"{name} is {value}; {pipeline.index.class_name} takes multiples of {multiple}: {near}.")


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


def _images(found: Any) -> torch.Tensor:
    """(N, H, W, C) from what pipelines return for "pt": (N, C, H, W), (N, F, C, H, W), arrays or PIL images."""
    if isinstance(found, list) and found and not isinstance(found[0], torch.Tensor):
        from diffusers.image_processor import VaeImageProcessor

        found = VaeImageProcessor.pil_to_numpy(found)
    if isinstance(found, list):
        found = torch.stack(found)
    if not isinstance(found, torch.Tensor):
        images = torch.from_numpy(found)  # channels last
    else:
        images = found.flatten(0, -4).permute(0, 2, 3, 1)
    if not images.isfinite().all():
        raise QuantError(
            "The pipeline made no picture but NaN; lower its guidance, or load it in bfloat16 or float32."
        )
    return images.float().clamp(0, 1).contiguous().cpu()
