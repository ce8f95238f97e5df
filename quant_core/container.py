"""Tensors in files: safetensors (its README, Format), each tensor where vector instructions can read it; checksums."""

from __future__ import annotations

import importlib.util
import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import StoreError, one_sentence

_LINE = 64  # bytes
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Bytes of each of them."""
        return self.dtype.itemsize


class FileRecord(NamedTuple):
    """What a file was when it was written."""

    bytes: int
    xxh3_128: str  # of all its bytes, in hexadecimal


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor | Deferred],
    metadata: Mapping[str, str],
    tell: Callable[[int], None] = lambda written: None,
) -> None:
    """Write a safetensors file.

    Larger powers of two come first, so that each tensor starts at a multiple of 64 bytes, or of the largest power of
    two that divides its size. `tell` is called after each tensor with its bytes; it may raise to stop.

    Raises:
        StoreError: the disk is full, the file cannot be written, or the format lacks a dtype.
    """
    ordered = sorted(tensors.items(), key=lambda item: -_alignment(item[1]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in DTYPE_NAMES:
            raise StoreError(f"{name} is {tensor.dtype}, which safetensors files cannot hold")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _LINE)
    try:
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                tell(stream.write(_bytes(tensor.make() if isinstance(tensor, Deferred) else tensor)))
    except OSError as error:
        raise StoreError(f"{path.name} cannot be written ({one_sentence(error)})") from error


def _alignment(tensor: torch.Tensor | Deferred) -> int:
    size = tensor.numel() * tensor.element_size()
    return min(size & -size, _LINE)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata.

    Raises:
        StoreError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path.name} is damaged ({one_sentence(error)})") from error


def ensure_checksums() -> None:
    """Check that checksums can be made.

    Raises:
        StoreError: the package for it is not installed.
    """
    if importlib.util.find_spec("xxhash") is None:
        raise StoreError("checksums need: pip install xxhash")


def record(path: Path) -> FileRecord:
    """What a file is now; all of it is read.

    Raises:
        OSError: it cannot be read.
    """
    import xxhash

    size = path.stat().st_size
    if not size:
        return FileRecord(0, xxhash.xxh3_128().hexdigest())
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return FileRecord(size, xxhash.xxh3_128(data).hexdigest())


def sync(path: Path) -> None:
    """Have a file, or what a folder lists, on the disk."""
    if os.name == "nt" and path.is_dir():  # which has no such call
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
