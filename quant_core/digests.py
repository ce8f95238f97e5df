"""Checksums of weight files, each file read whole once and then known by what does not change without it.

A file is taken to be what it was as long as it has its path, its number on the disk, its size, its times and the bytes
at some places in it. The disk's own number is left out: network and stacked file systems get another at each mount.
Copies, archives and `touch` set the time of its last writing; the time of its last change is the system's own, which
they cannot set. Windows has no such time, so that there a file that is overwritten in place under its old time, and
differs at none of those places, is taken for the old one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .errors import StoreError, one_sentence

_PLACES, _PIECE = 32, 4096  # how many pieces of a file are compared, and the bytes of each
_CHUNK = 16 * 2**20  # bytes that are read at once
_RESTED = 2.0  # seconds that file systems may count as one


def checksum(file: Path, memory: Path, check: Callable[[], None]) -> str:
    """The XXH3-128 of all bytes of a file, in hexadecimal.

    It is kept in the folder `memory`, where that can be written, without the file's name. `check` is called while the
    file is read, and may raise to stop.

    Raises:
        StoreError: the file cannot be read, or changes meanwhile.
    """
    note = memory / hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]
    try:
        with file.open("rb") as stream:
            seen = _seen(stream)
            if known := _recall(note, seen):
                return known
            made = _read(stream, check)
            if _seen(stream) != seen:
                raise StoreError(f"{file.name} is being written")
            changed = os.fstat(stream.fileno()).st_ctime
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{file.name} cannot be read ({one_sentence(error)})") from error
    if time.time() - changed > _RESTED:
        _remember(note, {"seen": seen, "xxh3_128": made})
    return made


def _seen(stream: BinaryIO) -> list[int | str]:
    """What tells an open file from what it was."""
    about = os.fstat(stream.fileno())
    sample = hashlib.sha256()
    for place in range(_PLACES):
        stream.seek(max(about.st_size - _PIECE, 0) * place // (_PLACES - 1))
        sample.update(stream.read(_PIECE))
    times = about.st_mtime_ns, about.st_ctime_ns
    return [about.st_ino, about.st_size, *times, sample.hexdigest()[:32]]


def _read(stream: BinaryIO, check: Callable[[], None]) -> str:
    import xxhash

    made, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    stream.seek(0)
    while count := stream.readinto(buffer):
        made.update(buffer[:count])
        check()
    return made.hexdigest()


def _recall(note: Path, seen: list[int | str]) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):  # whatever a note that was damaged makes of it
        told = json.loads(note.read_bytes())
        if told["seen"] == seen and isinstance(told["xxh3_128"], str):
            return told["xxh3_128"]
    return None


def _remember(note: Path, told: dict[str, object]) -> None:
    half = note.with_name(f"{note.name}-{os.getpid()}")
    with suppress(OSError):  # of a store that may only be read
        note.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(told), encoding="utf-8")
        os.replace(half, note)
