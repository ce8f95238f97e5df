"""Opening .gguf files (format: ggml-org/ggml docs/gguf.md): what their tensors are, and these as PyTorch has them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SourceError, choices, one_sentence
from ..json_file import POINTER, is_pointer

PLAIN = ("F32", "F16", "BF16")  # types that quantize nothing
_PREFIX = "model.diffusion_model."  # that files made from a whole checkpoint have before each name
_SHAPE = "comfy.gguf.orig_shape."  # in which ComfyUI-GGUF's converter records what it reshapes to fit blocks
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)  # as llama.cpp's gguf-split names them


class Tensor(NamedTuple):
    """A tensor of a file."""

    name: str
    type: Any  # a gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # of the weight
    data: Any  # a numpy array of numbers or, of other types than F32 and F16, of bytes


class File(NamedTuple):
    """An open file, memory-mapped."""

    path: Path
    architecture: str
    tensors: dict[str, Tensor]


def read(path: Path) -> File:
    """The open file; what is written to its tensors stays in memory.

    Raises:
        SourceError: it is no whole gguf file, a part of one, or its tensors overlap or leave gaps.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path, "c")
        count = _field(reader, "split.count", 1)
        architecture = str(_field(reader, "general.architecture", "none"))
        shapes = {tensor.name: _shape(reader, tensor) for tensor in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        if path.is_file() and is_pointer(path):
            raise SourceError(f"{path.name} {POINTER}.") from None
        raise SourceError(f"{path.name} is truncated or no gguf file ({one_sentence(error)}).") from None
    if (part := _PART.search(path.name)) and int(part[2]) > 1:
        count = int(part[2])
    if count > 1:
        raise SourceError(
            f"{path.name} is one of {count} parts of a file; put them together with llama.cpp's gguf-split --merge."
        )
    _check_places(path, reader)
    _check_types(path, reader)
    names = [tensor.name for tensor in reader.tensors]
    cut = len(_PREFIX) if names and all(name.startswith(_PREFIX) for name in names) else 0
    tensors = {}
    for tensor in reader.tensors:
        if math.prod(shapes[tensor.name]) != int(tensor.n_elements):
            stored = tuple(reversed(tensor.shape.tolist()))
            raise SourceError(f"{path.name} stores {tensor.name} as {stored}, and calls it {shapes[tensor.name]}.")
        name = tensor.name[cut:]
        tensors[name] = Tensor(name, tensor.tensor_type, shapes[tensor.name], tensor.data)
    return File(path, architecture, tensors)


def _field(reader: Any, name: str, default: Any) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    recorded = _field(reader, f"{_SHAPE}{tensor.name}", None)
    return tuple(map(int, reversed(tensor.shape) if recorded is None else recorded))


def _check_places(path: Path, reader: Any) -> None:
    """As llama.cpp does (ggml's gguf.cpp): each tensor begins where the one before it ends, aligned."""
    place = 0
    for tensor in reader.tensors:
        if tensor.data_offset - reader.data_offset != place:
            raise SourceError(f"{path.name} is damaged: {tensor.name} does not begin where the tensor before it ends.")
        place += tensor.n_bytes
        place += -place % int(reader.alignment)


def _check_types(path: Path, reader: Any) -> None:
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    for tensor in reader.tensors:
        if tensor.tensor_type.name not in PLAIN and tensor.tensor_type not in SUPPORTED_GGUF_QUANT_TYPES:
            known = choices(item.name for item in SUPPORTED_GGUF_QUANT_TYPES)
            raise SourceError(
                f"{path.name} stores {tensor.name} as {tensor.tensor_type.name}; the types that can be read: {known}."
            )


def values(file: File, device: str = "cpu") -> dict[str, Any]:
    """The tensors as diffusers has them, without their content on the meta device: packed as GGUFParameter where whole
    rows of a matrix are blocks, else as numbers."""
    return {name: _value(tensor, device) for name, tensor in file.tensors.items()}


def _value(tensor: Tensor, device: str) -> Any:
    import gguf
    import torch
    from diffusers.quantizers.gguf.utils import GGUFParameter

    kind = tensor.type.name
    if device == "meta" and kind in PLAIN:
        return torch.empty(tensor.shape, dtype=getattr(torch, _TORCH[kind]), device=device)
    data = torch.from_numpy(tensor.data)
    if kind in PLAIN:
        return data.view(getattr(torch, _TORCH[kind])).reshape(tensor.shape)
    block, size = gguf.GGML_QUANT_SIZES[tensor.type]
    if len(tensor.shape) == 2 and tensor.shape[1] % block == 0:
        rows = data.reshape(tensor.shape[0], tensor.shape[1] // block * size)
        return GGUFParameter(rows.to(device) if device == "meta" else rows, quant_type=tensor.type)
    if device == "meta":
        return torch.empty(tensor.shape, dtype=torch.float32, device=device)
    return unpack(GGUFParameter(data, quant_type=tensor.type)).reshape(tensor.shape)


_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_packed(value: Any) -> bool:
    """Whether a value has blocks instead of numbers."""
    return type(value).__name__ == "GGUFParameter"


def unpack(value: Any) -> Any:
    """A value as numbers."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(value) if is_packed(value) else value


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a value's numbers."""
    return tuple(value.quant_shape if is_packed(value) else value.shape)
