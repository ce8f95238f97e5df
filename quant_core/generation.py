"""From a prompt to images, through any diffusers pipeline, called as an unquantized one is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from .errors import SpecError, choices, did_you_mean
from .pipeline import QuantizedPipeline

OnStep = Callable[[int, int], None]  # steps done, steps in all; raise to stop

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
_RESERVED = {"generator", "output_type", "return_dict", "callback_on_step_end", "callback", "callback_steps"}


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate. None leaves the pipeline's own default; `extra` is further arguments of its `__call__`.

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

    def __post_init__(self):
        for name in ("width", "height", "steps", "images_per_prompt", "max_sequence_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise SpecError(f"{name} is {value!r}; it takes a whole number of at least 1.")
        if type(self.seed) is not int or not 0 <= self.seed < 2**64:
            raise SpecError(f"seed is {self.seed!r}; it takes a whole number from 0 to 2**64 - 1.")
        if self.output not in OUTPUTS:
            raise SpecError(f"output is {self.output!r}; use one of: {choices(OUTPUTS)}.")
        renamed = {theirs: ours for ours, theirs in _OURS.items() if theirs != ours}
        for name in self.extra:
            if name in _RESERVED:
                raise SpecError(f"{name} is set by the engine and cannot be given.")
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
    arguments = _arguments(pipeline, request)
    try:
        with _reporting(pipeline.pipe, arguments, on_step):
            result = pipeline.pipe(**arguments)
    finally:
        _drop_empty_registries(pipeline)
    found = getattr(result, "images", None)
    if found is None:
        found = getattr(result, "frames", None)
    if found is None:
        raise SpecError(f"{pipeline.index.class_name} makes neither images nor video but {type(result).__name__}.")
    return found.detach().cpu() if request.output == "latents" else _images(found)


def _drop_empty_registries(pipeline: QuantizedPipeline) -> None:
    """diffusers leaves on a denoiser that ran a registry of hooks that holds the denoiser: a cycle, so that dropping
    the pipeline would free its weights only when the garbage collector comes by."""
    for module in pipeline.models.values():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and not registry.hooks:
            del module._diffusers_hook


def _arguments(pipeline: QuantizedPipeline, request: GenerateRequest) -> dict[str, Any]:
    name = pipeline.index.class_name
    accepted = inspect.signature(type(pipeline.pipe).__call__).parameters
    arguments = {theirs: getattr(request, ours) for ours, theirs in _OURS.items()}
    arguments = {
        key: value for key, value in arguments.items() if value is not None and (key != "negative_prompt" or value)
    }
    for key in [*arguments, *request.extra]:
        if key not in accepted:
            ours = next((ours for ours, theirs in _OURS.items() if theirs == key), key)
            hint = did_you_mean(key, accepted)
            usable = choices(accepted.keys() - _RESERVED - {"self", "args", "kwargs"})
            raise SpecError(f"{name} takes no {ours}{hint}; it takes: {usable}.")
    arguments |= request.extra
    _check_effect(pipeline, arguments, accepted)
    _check_size(pipeline, arguments)
    arguments["generator"] = torch.Generator("cpu").manual_seed(request.seed)
    arguments["output_type"] = "latent" if request.output == "latents" else "pt"
    return arguments


def _check_effect(pipeline: QuantizedPipeline, arguments: dict[str, Any], accepted: Mapping[str, Any]) -> None:
    """Refuse what these pipelines would ignore without a word."""
    if "negative_prompt" in arguments and "true_cfg_scale" in accepted:
        scale = arguments.get("true_cfg_scale", accepted["true_cfg_scale"].default)
        if isinstance(scale, (int, float)) and scale <= 1:
            raise SpecError(
                f"{pipeline.index.class_name} ignores negative_prompt while true_cfg_scale is {scale}; "
                "set true_cfg_scale above 1, or leave negative_prompt out."
            )
    denoiser = getattr(pipeline.pipe, "transformer", None)
    embeds = getattr(getattr(denoiser, "config", None), "guidance_embeds", True)
    if arguments.get("guidance_scale", 0) > 1 and not embeds and "true_cfg_scale" in accepted:
        raise SpecError(
            f"This {type(denoiser).__name__} ignores guidance (guidance_embeds is false); "
            "set true_cfg_scale with a negative_prompt instead."
        )


def _check_size(pipeline: QuantizedPipeline, arguments: dict[str, Any]) -> None:
    """Refuse a size that the pipeline would round without a word."""
    processor = getattr(pipeline.pipe, "image_processor", None) or getattr(pipeline.pipe, "video_processor", None)
    multiple = getattr(getattr(processor, "config", None), "vae_scale_factor", 1)
    for name in ("width", "height"):
        if (value := arguments.get(name, 0)) % multiple:
            near = f"{value // multiple * multiple or multiple} or {value // multiple * multiple + multiple}"
            raise SpecError(f"{name} is {value}; {pipeline.index.class_name} takes multiples of {multiple}: {near}.")


@contextmanager
def _reporting(pipe: Any, arguments: dict[str, Any], on_step: OnStep | None) -> Iterator[None]:
    """Call `on_step` after each denoising step, by the pipeline's callback or, where it has none, its progress bar."""
    if on_step is None:
        yield
    elif "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:

        def at_end(pipe, step, timestep, state):
            on_step(step + 1, getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps))
            return state

        arguments["callback_on_step_end"] = at_end
        yield
    else:
        pipe.progress_bar = lambda iterable=None, total=None: _Bar(iterable, total, on_step)
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
    return images.float().clamp(0, 1).contiguous().cpu()
