"""Writing .gguf files (format: ggml-org/ggml docs/gguf.md) of the weights of one component."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from ..errors import StoreError, one_sentence
from ._slices import by_rows, is_large

_MOST_DIMENSIONS = 4  # of a ggml tensor
_NUMPY = {"F32": "float32", "F16": "float16"}  # ggml types that numpy has too


def write(
    path: Path,
    architecture: str,
    tensors: Sequence[tuple[str, Any, str]],
    dtype: Any,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write (name, tensor, type) as a gguf file, one tensor packed at a time.

    A type is the name of a ggml type. Matrices of block types are quantized here, out of `dtype`, unless they are
    packed bytes already. `tell` is called after each with the numbers written so far and those of all; it may raise to
    stop.

    Raises:
        StoreError: the disk is full or the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    try:
        for name, tensor, kind in tensors:
            qtype = getattr(gguf.GGMLQuantizationType, kind)
            shape = stored_shape(tensor)
            whole = kind in _NUMPY or _is_packed(tensor)
            packed = shape if whole else gguf.quants.quant_shape_to_byte_shape(shape, qtype)
            of_file = numpy.dtype(_NUMPY.get(kind, "uint8"))
            writer.add_tensor_info(name, packed, of_file, math.prod(packed) * of_file.itemsize, raw_dtype=qtype)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(tensor.numel() for _, tensor, _ in tensors)
        for _, tensor, kind in tensors:
            writer.write_tensor_data(_bytes(tensor, kind, dtype))
            done += tensor.numel()
            tell(done, total)
    except OSError as error:
        raise StoreError(f"{path.name} cannot be written ({one_sentence(error)})") from error
    finally:
        writer.close()


def pack(matrix: Any, kind: str) -> numpy.ndarray:
    """A matrix of (out_features, in_features) as packed bytes of a block type, (out_features, bytes per row)."""
    import gguf
    import torch

    qtype = getattr(gguf.GGMLQuantizationType, kind)

    def quantized(rows):
        return gguf.quants.quantize(rows.to("cpu", torch.float32).numpy(), qtype)

    if not is_large(matrix):
        return quantized(matrix)
    (packed,) = by_rows(matrix, lambda rows: [torch.from_numpy(quantized(rows))])
    return packed.numpy()


def stored_shape(tensor: Any) -> tuple[int, ...]:
    """ggml has one to four dimensions; what has fewer or more is stored flat."""
    return tuple(tensor.shape) if 1 <= tensor.ndim <= _MOST_DIMENSIONS else (tensor.numel(),)


def _bytes(tensor: Any, kind: str, dtype: Any) -> numpy.ndarray:
    import torch

    if kind not in ("BF16", *_NUMPY) and not _is_packed(tensor):
        return pack(tensor.to(dtype), kind)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.numpy() if kind in _NUMPY else flat.view(torch.uint8).numpy()


def _is_packed(tensor: Any) -> bool:
    return not tensor.is_floating_point()
