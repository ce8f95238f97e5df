"""Sizes and numbers of frames that a pipeline cannot make as they are asked for: refused, or told afterwards."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .errors import SpecError

_SIDES = ("width", "height")
_FRAMES = ("num_frames", "frames", "video_length")  # the pipelines' words
# In a pipeline's code, whether it rounds the number itself or makes so many frames of latents.
_FITTED = re.compile(  # and that it makes latents of what a function makes of the sides
    r"(\w*height), (\w*width) = (\w+)\(height, width, (?:self\.(\w+)|(\d+))\).*?, \1, \2\)", re.DOTALL
)
_ROUNDED = re.compile(r"\b(?:num_)?frames(?: - 1\))? // self\.(\w+)")


def check_sizes(pipe: Any, arguments: Mapping[str, Any], accepted: Mapping[str, inspect.Parameter]) -> None:
    """Refuse a width, height or number of frames that the pipeline would round.

    Raises:
        SpecError: there is one; its neighbours are named.
    """
    multiple = 1 if _scales_back(pipe, arguments) else _multiple(pipe)
    for name in _SIDES:
        _check(pipe, name, arguments.get(name), multiple, 0)
    for name in set(_FRAMES).intersection(arguments, accepted):
        if factor := _frame_factor(pipe, accepted[name].default):
            _check(pipe, name, arguments[name], factor, 1)
    _check_tiles(pipe, arguments)


def _check(pipe: Any, name: str, value: Any, multiple: int, rest: int) -> None:
    if type(value) is not int or (value - rest) % multiple == 0:
        return
    below = (value - rest) // multiple * multiple + rest
    near = " or ".join(str(number) for number in (below, below + multiple) if number > 0)
    takes = f"one more than a multiple of {multiple}" if rest else f"multiples of {multiple}"
    raise SpecError(f"{name} is {value}; {type(pipe).__name__} takes {takes}: {near}.")


def _check_tiles(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse what a VAE's tiles do not fill: Allegro's makes as many as fit, and leaves the rest grey."""
    vae = getattr(pipe, "vae", None)
    tiles, steps = getattr(vae, "kernel", None), getattr(vae, "stride", None)
    if not isinstance(tiles, tuple) or not isinstance(steps, tuple):
        return
    for name, tile, step in zip(("num_frames", "height", "width"), tiles, steps, strict=True):
        value = arguments.get(name, tile)
        more = max(value - tile, 0) // step * step if step > 0 else 0
        if value != tile + more:
            near = [tile + more, *([tile + more + step] if value > tile and step > 0 else [])]
            each = f" and {step} more each" * (step > 0)
            raise SpecError(
                f"{name} is {value}; {type(pipe).__name__} decodes in tiles of {tile}{each}: "
                f"{' or '.join(map(str, near))}."
            )


def _scales_back(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the pipeline takes any size, which it computes in another (resolution binning) and crops to.

    Not all that know the argument do: HunyuanDiT leaves its picture in the other size.
    """
    call = inspect.unwrap(type(pipe).__call__)
    binned = inspect.signature(call).parameters.get("use_resolution_binning")
    crops = "resize_and_crop_tensor" in call.__code__.co_names
    return binned is not None and crops and bool(arguments.get("use_resolution_binning", binned.default))


def _multiple(pipe: Any) -> int:
    """What sides are multiples of: of what the pipeline's processor rounds to, of a patch of its denoiser's, and of
    what its own code or that of a stage rounds to."""
    stages = [part for part in vars(pipe).values() if hasattr(type(part), "components")]
    return math.lcm(_patch(pipe), *map(_fitted, (pipe, *stages)))


def _fitted(pipe: Any) -> int:
    call = inspect.unwrap(type(pipe).__call__)
    if (match := _FITTED.search(_source(call))) is None:
        return 1
    fit, factor = call.__globals__.get(match[3]), int(match[5]) if match[5] else getattr(pipe, match[4], None)
    if not callable(fit) or type(factor) is not int:
        return 1
    made = [fit(side, side, factor) for side in range(1, 3 * factor**2)]
    steps = [side for side in range(1, len(made)) if made[side] != made[side - 1]]
    return steps[1] - steps[0] if len(steps) > 1 else 1


def _source(method: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(method))
    except (OSError, TypeError):  # there is none
        return ""


def _patch(pipe: Any) -> int:
    processor = getattr(pipe, "image_processor", None)
    processor = getattr(pipe, "video_processor", None) if processor is None else processor
    rounded = getattr(getattr(processor, "config", None), "vae_scale_factor", 1)
    scales = (value for name, value in vars(pipe).items() if name.startswith("vae_") and "spatial" in name)
    scale = next((value for value in scales if type(value) is int), getattr(pipe, "vae_scale_factor", None))
    patch = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "patch_size", 1)
    patch = patch[-1] if isinstance(patch, (list, tuple)) and patch else patch  # of frames, height, width
    if type(scale) is not int or type(patch) is not int:
        return rounded
    return math.lcm(rounded, scale * patch)


def _frame_factor(pipe: Any, default: Any) -> int | None:
    """Of how many frames the pipeline makes one of latents, the first apart, as its own code says; None where that
    does not say so, or its own `default` is otherwise, so that it must deal with any number."""
    for method in (type(pipe).__call__, getattr(type(pipe), "prepare_latents", None)):
        match = _ROUNDED.search(_source(method))
        factor = getattr(pipe, match[1], None) if match else None
        if type(factor) is int and factor > 1:
            return None if type(default) is int and (default - 1) % factor else factor
    return None


@contextmanager
def keeping_size(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """As long as this lasts, refuse a size that the pipeline has replaced by another when it makes its first latents.

    A pipeline that scales its picture back may. Raises SpecError from within its call.
    """
    asked = {name: arguments[name] for name in _SIDES if arguments.get(name)}
    prepare = getattr(pipe, "prepare_latents", None)
    if not asked or prepare is None or _scales_back(pipe, arguments):
        yield
        return

    def checked(*args: Any, **kwargs: Any) -> Any:
        vars(pipe).pop("prepare_latents", None)  # later ones may be of a further stage
        given = inspect.signature(prepare).bind(*args, **kwargs).arguments
        made = {name: given.get(name, value) for name, value in asked.items()}
        if made != asked and not _are_latents(made, asked):
            raise SpecError(f"{type(pipe).__name__} makes {_text(made)} of {_text(asked)}; ask for what it makes.")
        return prepare(*args, **kwargs)

    pipe.prepare_latents = checked
    try:
        yield
    finally:
        vars(pipe).pop("prepare_latents", None)


def _are_latents(made: Mapping[str, Any], asked: Mapping[str, int]) -> bool:
    """Whether a pipeline counts in latents there: all sides are divided by one number, of at least 8."""
    ratios = {asked[name] / size if type(size) is int and size else 0 for name, size in made.items()}
    return len(ratios) == 1 and min(ratios) >= 8


def _text(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def notices_of_size(images: torch.Tensor, name: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """What a user must be told of images (N, H, W, C) that are not what was asked of the pipeline of that name."""
    made = {"width": images.shape[2], "height": images.shape[1]}
    for key in set(_FRAMES).intersection(arguments):
        if type(arguments[key]) is int and (clips := _clips(arguments)):
            made[key] = len(images) / clips
    asked = {key: arguments[key] for key in made if arguments.get(key)}
    other = {key: made[key] for key in asked if made[key] != asked[key]}
    if other:
        made_text = _text({key: f"{value:g}" for key, value in other.items()})
        yield f"{name} made {made_text}, not {_text({key: asked[key] for key in other})} as was asked."


def _clips(arguments: Mapping[str, Any]) -> int:
    prompt = arguments.get("prompt")
    each = arguments.get("num_videos_per_prompt") or arguments.get("num_images_per_prompt") or 1
    return each * (len(prompt) if isinstance(prompt, list) else 1)
