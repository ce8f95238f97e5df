"""What to generate, checked by itself and against the pipeline that is called with it."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType, NoneType
from typing import Any, Union, get_args, get_origin

import torch

from .errors import SpecError, choices, did_you_mean
from .pipeline import QuantizedPipeline
from .results import check_makes_pictures
from .sizes import check_sizes
from .texts import cleaned
from .user_text import check_type

TYPICAL_PROMPT = " ".join(["word"] * 60)  # for what depends on a prompt only by its length
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
_MEDIA = ("Image", "Tensor", "ndarray")  # classes that hold pictures, latents and embeddings
_RESERVED = {
    *("generator", "output_type", "return_dict"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback", "callback_steps"),
}


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate. None leaves the pipeline's own default; `extra` is further arguments of its `__call__`. Byte
    order marks in texts are left out.

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
        check_type("negative_prompt", self.negative_prompt, str, list, NoneType)
        check_type("extra", self.extra, Mapping)
        check_type("remember", self.remember, bool)
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
        for name in ("prompt", "negative_prompt"):
            object.__setattr__(self, name, cleaned(name, getattr(self, name)))
        extra = {name: cleaned(name, value) for name, value in self.extra.items()}
        object.__setattr__(self, "extra", MappingProxyType(extra))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, Real) and not isinstance(item, bool) and math.isfinite(item) for item in value
    )


def call_arguments(pipeline: QuantizedPipeline, request: GenerateRequest) -> dict[str, Any]:
    """What the pipeline is called with for a request.

    Raises:
        SpecError: the pipeline takes no such argument, it would have no effect or be rounded, or no picture is made.
    """
    check_makes_pictures(pipeline.pipe)
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
    check_sizes(pipeline.pipe, arguments, accepted)
    arguments["generator"] = torch.Generator("cpu").manual_seed(request.seed)
    # Pipelines without a processor hand over "pt" as the decoder leaves it, in -1..1, but "np" in 0..1.
    processed = hasattr(pipeline.pipe, "image_processor") or hasattr(pipeline.pipe, "video_processor")
    arguments["output_type"] = "latent" if request.output == "latents" else "pt" if processed else "np"
    return arguments


def _check_types(name: str, arguments: Mapping[str, Any], accepted: Mapping[str, inspect.Parameter]) -> None:
    """Refuse a further argument that is not of the type the pipeline's signature names, where it names plain ones.

    None is what pipelines take for nothing, and of the forms of media they name one and take all.
    """
    for key, value in arguments.items():
        allowed = _types(accepted[key].annotation)
        is_media = any(kind in str(accepted[key].annotation) for kind in _MEDIA) and _is_media(value)
        is_one = isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
        if allowed and value is not None and not is_one and not is_media:
            wanted = " or ".join(sorted(kind.__name__ for kind in set(allowed) - {type(None)}))
            raise SpecError(f"{key} is {repr(value)[:80]}; {name} takes {wanted} there.")


def _is_media(value: Any, depth: int = 3) -> bool:
    """Whether it is a picture, a tensor, or lists of them, in which some may be left out."""
    if type(value) in (list, tuple):
        return bool(value) and depth > 0 and all(item is None or _is_media(item, depth - 1) for item in value)
    return any(kind.__name__ in _MEDIA for kind in type(value).__mro__)


def _types(annotation: Any) -> tuple[type, ...]:
    """The classes that an annotation allows, none if it cannot be told."""
    if isinstance(annotation, (types.UnionType,)) or get_origin(annotation) is Union:
        parts = [_types(part) for part in get_args(annotation)]
        return tuple(kind for part in parts for kind in part) if all(parts) else ()
    kind = get_origin(annotation) or annotation
    if not isinstance(kind, type) or kind is inspect.Parameter.empty:
        return ()
    return {float: (float, int), tuple: (tuple, list)}.get(kind, (kind,))


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


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 0.0
