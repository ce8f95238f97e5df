"""What safetensors files hold, by their headers (format: safetensors' README), without reading a weight."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .errors import SourceError, one_sentence
from .json_file import POINTER, is_pointer


class Stored(NamedTuple):
    """A tensor as a file has it."""

    dtype: str  # as the format writes it: F32, BF16, I64
    shape: tuple[int, ...]
    file: Path


def check_headers(name: str, files: Iterable[Path]) -> None:
    """Check the header of each file of a component against the file.

    Raises:
        SourceError: one is truncated, damaged or a Git LFS pointer, or two of them hold the same tensor.
    """
    from safetensors import SafetensorError, safe_open

    seen: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                held = list(opened.keys())
        except (SafetensorError, OSError) as error:
            if file.is_file() and is_pointer(file):
                raise SourceError(f"{name}: its {file.name} {POINTER}.") from None
            raise SourceError(
                f"{name}: {file.name} is truncated or not what its header says ({one_sentence(error)}); "
                "download it again."
            ) from None
        for tensor in held:
            if tensor in seen:
                raise SourceError(f"{name}: {tensor} is in {seen[tensor].name} and in {file.name}; it must be in one.")
            seen[tensor] = file


def header(file: Path) -> bytes:
    """The JSON header of a file that `check_headers` has checked."""
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def tensors_in(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of files, by name."""
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), file)
        for file in files
        for name, entry in json.loads(header(file)).items()
        if name != "__metadata__"
    }


def stored_bytes(files: Iterable[Path]) -> int:
    """Bytes of the tensors in files."""
    return sum(file.stat().st_size - 8 - len(header(file)) for file in files)


def stored_dtypes(files: Iterable[Path]) -> set[str]:
    """The dtypes of the tensors in files."""
    return {tensor.dtype for tensor in tensors_in(files).values()}
