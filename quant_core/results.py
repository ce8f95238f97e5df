"""What a pipeline returns: where its pictures are, known before it runs, and what else is in it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from .errors import SpecError

_PICTURES = ("images", "frames", "image", "video", "rgb")  # the names that diffusers' outputs have for them


def check_makes_pictures(pipe: Any) -> None:
    """Refuse, before it runs, a pipeline whose output has no pictures.

    Raises:
        SpecError: it makes something else, as audio.
    """
    made = _output_class(type(pipe))
    if made is not None and not {field.name for field in dataclasses.fields(made)}.intersection(_PICTURES):
        fields = " and ".join(field.name for field in dataclasses.fields(made))
        raise SpecError(
            f"{type(pipe).__name__} makes neither images nor video but {fields}; load a pipeline that makes pictures."
        )


def _output_class(kind: type) -> type | None:
    """The class of what a pipeline returns, which its call names; None where that calls other pipelines."""
    from diffusers.utils import BaseOutput

    call = inspect.unwrap(kind.__call__)
    code, names = getattr(call, "__code__", None), getattr(call, "__globals__", {})
    found = [names.get(name) for name in code.co_names] if code else []
    outputs = [item for item in found if isinstance(item, type) and issubclass(item, BaseOutput)]
    return outputs[0] if len(outputs) == 1 and dataclasses.is_dataclass(outputs[0]) else None


def found_in(result: Any, name: str) -> Any:
    """The pictures or latents in what the pipeline of that name returned.

    Raises:
        SpecError: there are none.
    """
    if (field := _field(result)) is not None:
        return getattr(result, field)
    raise SpecError(f"{name} makes neither images nor video but {type(result).__name__}.")


def _field(result: Any) -> str | None:
    return next((field for field in _PICTURES if getattr(result, field, None) is not None), None)


def size_of(result: Any) -> tuple[int, int] | None:
    """Width and height of what a pipeline returned, as channels first tensors or channels last arrays; None where that
    cannot be told."""
    found = getattr(result, _field(result) or "", None)
    if isinstance(found, torch.Tensor) and found.ndim >= 3:
        return found.shape[-1], found.shape[-2]
    shape = getattr(found, "shape", ())
    return (shape[-2], shape[-3]) if len(shape) >= 3 else None


def pictures(found: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, H, W, C) from what pipelines return for "pt": (N, C, H, W), (N, F, C, H, W), arrays or PIL images, also in
    lists; and whether all of it was finite, on the device where it is."""
    while isinstance(found, list) and found and isinstance(found[0], list):  # a list for each prompt
        found = [item for inner in found for item in inner]
    if isinstance(found, list) and found and not isinstance(found[0], torch.Tensor):
        from diffusers.image_processor import VaeImageProcessor

        found = VaeImageProcessor.pil_to_numpy(found)
    if isinstance(found, list):
        found = torch.stack(found)
    if not isinstance(found, torch.Tensor):
        images = torch.from_numpy(found)  # channels last
    else:
        images = found.flatten(0, -4).permute(0, 2, 3, 1)
    return images.float().clamp(0, 1).contiguous(), images.isfinite().all()


def notices_of_result(result: Any, images: torch.Tensor, name: str) -> Iterator[str]:
    """What a user must be told of a result and its images (N, H, W, C): which a safety checker flagged, and what the
    pipeline of that name made beside them."""
    taken = _field(result)
    for field, value in getattr(result, "__dict__", {}).items():
        if "nsfw" in field and isinstance(value, (list, tuple)):
            for number in (number for number, flag in enumerate(value) if flag):
                is_black = len(value) == len(images) and not images[number].any()
                yield (
                    f"The safety checker of {name} flagged picture {number + 1} of {len(value)}"
                    f"{', which it made black' * is_black}; another seed or prompt may pass."
                )
        elif field != taken and "latent" not in field and _is_media(value):
            yield f"{name} also made {field}, which is left out here."


def _is_media(value: Any) -> bool:
    return hasattr(value, "shape") or isinstance(value, (list, tuple)) and any(map(_is_media, value))
