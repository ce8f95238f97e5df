"""What an entry of the store says of itself, in JSON: what it is of, what that depends on, a checksum of each file.

The name of an entry ends in a hash of all that its content depends on, and its manifest in a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .container import FileRecord, record
from .errors import DamagedEntry

MANIFEST = "manifest.json"
_FORMAT = 1  # counts changes of what an entry looks like
_SUFFIXES = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Key:
    """What the content of an entry depends on, and for people to read, what it is."""

    label: str  # begins the name of the entry
    content: dict[str, Any]  # as JSON has it
    about: dict[str, Any]  # as JSON has it

    @cached_property
    def name(self) -> str:
        """Of the entry."""
        text = json.dumps({"format": _FORMAT, **self.content}, sort_keys=True)
        return f"{self.label}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def write_manifest(folder: Path, key: Key, began: float) -> None:
    """Record the files of a folder as the entry of a key, whose making began at `began` of `time.perf_counter`.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    files = {path.name: record(path)._asdict() for path in sorted(folder.iterdir())}
    made = {
        "format": _FORMAT,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.perf_counter() - began, 3),
        **key.about,
        "key": key.content,
        "files": files,
    }
    (folder / MANIFEST).write_text(_text(_sealed(made)), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an entry, as it was written.

    Raises:
        DamagedEntry: it is damaged, or of another version.
        OSError: it cannot be read.
    """
    text = (folder / MANIFEST).read_bytes()
    try:
        manifest = json.loads(text)
        sound = _text(_sealed(manifest)).encode() == text and _is_complete(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise DamagedEntry(f"its {MANIFEST} is damaged")
    if manifest["format"] != _FORMAT:
        raise DamagedEntry(f"it has the format {manifest['format']}, and this version reads {_FORMAT}")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], name: str) -> None:
    """Compare each file of the entry of that name, all its bytes, with what was written.

    Raises:
        DamagedEntry: a file is missing or another, or the manifest is another entry's.
        OSError: a file cannot be read.
    """
    if Key(name.rpartition("-")[0], manifest["key"], {}).name != name:
        raise DamagedEntry("its manifest is another entry's")
    records = {folder / file: FileRecord(**made) for file, made in manifest["files"].items()}
    for path, made in records.items():
        if path.is_symlink() or not path.is_file():
            raise DamagedEntry(f"{path.name} is missing")
        if path.stat().st_size != made.bytes:
            raise DamagedEntry(f"{path.name} has {path.stat().st_size} bytes and had {made.bytes}")
    with ThreadPoolExecutor(max_workers=4) as pool:
        for (path, made), now in zip(records.items(), pool.map(record, records), strict=True):
            if now != made:
                raise DamagedEntry(f"{path.name} is not what was written (checksum)")


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With a checksum of all the rest."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(_text(rest).encode()).hexdigest()}


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether all is there that is read, and no file name leaves the folder."""
    files = manifest["files"]
    plain = all(Path(name).name == name and name.endswith(_SUFFIXES) for name in files)
    records = [FileRecord(**made) for made in files.values()]
    typed = all(type(made.bytes) is int and isinstance(made.xxh3_128, str) for made in records)
    named = isinstance(manifest["key"], dict) and isinstance(manifest["what"], str) and type(manifest["format"]) is int
    return bool(files) and plain and typed and named
