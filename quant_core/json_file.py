"""A JSON file of a model folder, read and distrusted."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from .errors import SourceError, one_sentence

_POINTER = b"version https://git-lfs.github.com/spec/"  # git-lfs' docs/spec.md, The Pointer
POINTER = "is a Git LFS pointer, not the file itself; run git lfs pull in the model's folder, or download it again"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file that belongs to `what`. It is read as strictly as diffusers and transformers will.

    Raises:
        SourceError: there is no such file, or it holds no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise SourceError(f"{what} has no {path.name}.") from None
    except OSError as error:
        raise SourceError(f"{what}: its {path.name} cannot be read ({one_sentence(error)}).") from None
    if content.startswith(_POINTER):
        raise SourceError(f"{what}: its {path.name} {POINTER}.")
    if content.startswith(codecs.BOM_UTF8):
        raise SourceError(
            f"{what}: its {path.name} begins with a byte order mark, which neither diffusers nor transformers reads; "
            "save it as UTF-8 without one."
        )
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # what is no UTF-8 and what is no JSON are ValueErrors
        raise SourceError(f"{what}: its {path.name} is damaged ({error}).") from None
    if not isinstance(data, dict):
        raise SourceError(f"{what}: its {path.name} holds no JSON object.")
    return data


def is_pointer(path: Path) -> bool:
    """Whether a file is what a clone without git-lfs leaves in the place of a large one."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER
