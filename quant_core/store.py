"""Quantized components on disk: each quantized once, and read back from then on.

An entry is a folder of weight files (safetensors, or what the backend has of its own) with a manifest of them.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .container import sync
from .errors import DamagedEntry, StoreError, gib, one_sentence
from .manifest import MANIFEST, Key, check_files, read_manifest, write_manifest

try:
    import fcntl
except ImportError:  # Windows, where a file that is open can be neither removed nor renamed
    fcntl = None

logger = logging.getLogger(__name__)

OFF = "off"
LIMIT = 100 * 2**30  # bytes of all entries
_PARTIAL, _DAMAGED = ".partial", ".damaged"
_NAME = re.compile(rf".+-[0-9a-f]{{20}}(-\d+)?({re.escape(_PARTIAL)}|{re.escape(_DAMAGED)})?")
_WAIT = 0.2  # seconds


def default_store() -> Path:
    """The store outside of a host: in the user's cache folder, unless QUANTIZED_DIFFUSERS_STORE names another."""
    if chosen := os.environ.get("QUANTIZED_DIFFUSERS_STORE"):
        return Path(chosen)
    given = os.environ.get("XDG_CACHE_HOME", "")  # which counts only if absolute, says its specification
    return Path(given if os.path.isabs(given) else Path.home() / ".cache") / "quantized_diffusers"


@dataclass(frozen=True)
class Entry:
    """A component in the store. While `hold` is open, nothing evicts it."""

    folder: Path
    manifest: dict[str, Any]
    used: float  # when it was read last, in seconds since 1970
    hold: Any = None

    @property
    def files(self) -> list[Path]:
        """Its weight files."""
        return [self.folder / name for name in self.manifest["files"]]

    @property
    def size(self) -> int:
        """Bytes of its weight files."""
        return sum(made["bytes"] for made in self.manifest["files"].values())


class Store:
    """A folder of entries that together take no more than `limit` bytes; several processes may use it at once."""

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.folder = folder
        self.limit = limit

    @property
    def digests(self) -> Path:
        """Where checksums of checkpoints are kept."""
        return self.folder / ".digests"

    def find(self, key: Key, verify: bool = True) -> Entry | None:
        """The entry of a key, held, every byte of it verified.

        Raises:
            DamagedEntry: it is not what was written.
            StoreError: it cannot be read now.
        """
        folder = self.folder / key.name
        hold = _hold(folder / MANIFEST)
        if hold is None:
            if folder.is_dir() and not (folder / MANIFEST).exists():
                raise DamagedEntry(f"it has no {MANIFEST}")
            return None
        try:
            entry = _open(folder, hold)
            if verify:
                _verify(entry)
            with suppress(OSError):  # of a store that may only be read
                os.utime(folder / MANIFEST)
            return entry
        except BaseException as error:
            hold.close()
            if isinstance(error, FileNotFoundError):
                raise DamagedEntry(f"{Path(error.filename).name} is missing") from error
            if isinstance(error, OSError) and not isinstance(error, StoreError):
                raise StoreError(f"{folder} cannot be read ({one_sentence(error)})") from error
            raise

    def set_aside(self, key: Key, why: str) -> None:
        """Move what is no good out of the way. Only within `alone`, where nobody can have made it anew."""
        logger.warning("The stored %s is set aside and made again: %s.", key.name, why)
        aside = self.folder / f"{key.name}{_DAMAGED}"
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):
            os.replace(self.folder / key.name, aside)

    @contextmanager
    def alone(self, key: Key, check: Callable[[], None]) -> Iterator[None]:
        """Let one process at a time make an entry; `check` is called while another does, and may raise to stop.

        Raises:
            StoreError: the folder cannot be written, or its file system has no locks.
        """
        import filelock

        lock = filelock.FileLock(self.folder / ".locks" / key.name)
        with _as_store_error(self.folder):
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        while True:
            with _as_store_error(self.folder), suppress(filelock.Timeout):
                lock.acquire(timeout=_WAIT)
                break
            check()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def writing(self, key: Key, size: int) -> Iterator[Path]:
        """A folder that becomes the entry when the block ends, and is gone when it raises. Only within `alone`.

        The block writes the weight files, of about `size` bytes.

        Raises:
            StoreError: there is no room, or the folder cannot be written.
        """
        partial, folder = self.folder / f"{key.name}{_PARTIAL}", self.folder / key.name
        began = time.perf_counter()
        with _as_store_error(self.folder):
            try:
                self._make_room(size)
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                partial.mkdir(parents=True)
                yield partial
                write_manifest(partial, key, began)
                for path in (*partial.iterdir(), partial):
                    sync(path)
                os.replace(partial, folder)
                sync(self.folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        if size > self.limit:
            raise StoreError(f"it takes {gib(size)} and the store's limit is {gib(self.limit)}")
        self.prune(self.limit - size)
        if (taken := sum(entry.size for entry in self.entries())) + size > self.limit:
            raise StoreError(f"it takes {gib(size)}, and {gib(taken)} of the limit of {gib(self.limit)} are in use")
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if (free := shutil.disk_usage(existing).free) < size:
            raise StoreError(f"it takes {gib(size)} and its disk has {gib(free)} left")

    def entries(self) -> list[Entry]:
        """All entries whose manifest can be read, the one used last at the end."""
        found = []
        for path in self._folders():
            if path.suffix not in (_PARTIAL, _DAMAGED):
                with suppress(StoreError, OSError):
                    found.append(_open(path))
        return sorted(found, key=lambda entry: entry.used)

    def _folders(self) -> list[Path]:
        """Entries, unfinished ones and those set aside; what else someone keeps there is not looked at."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return [path for path in found if _NAME.fullmatch(path.name) and path.is_dir()]

    def aside(self) -> dict[str, int]:
        """Name -> bytes of what was set aside as damaged."""
        return {path.name: _size(path) for path in self._folders() if path.suffix == _DAMAGED}

    def prune(self, limit: int = 0) -> list[Entry]:
        """Remove what killed processes left, and the entries used longest ago until the others take `limit` bytes.

        One that is in use stays. Returns the entries that were removed.
        """
        if not limit:
            shutil.rmtree(self.digests, ignore_errors=True)
        for path in self._folders():
            if path.suffix == _PARTIAL:
                self._sweep(path)
        entries, removed = self.entries(), []
        aside = [path for path in self._folders() if path.suffix == _DAMAGED]
        taken = sum(entry.size for entry in entries) + sum(map(_size, aside))
        for path in aside:
            if taken > limit:
                taken -= _size(path)
                shutil.rmtree(path, ignore_errors=True)
        for entry in entries:
            if taken > limit and _remove(entry):
                taken -= entry.size
                removed.append(entry)
        return removed

    def _sweep(self, partial: Path) -> None:
        """Remove an unfinished folder if the process that wrote it is gone."""
        import filelock

        lock = filelock.FileLock(self.folder / ".locks" / partial.name.removesuffix(_PARTIAL), timeout=0)
        with suppress(filelock.Timeout, OSError, NotImplementedError), lock:
            shutil.rmtree(partial, ignore_errors=True)

    def verify(self) -> dict[str, str]:
        """Name of every entry -> what is wrong with it, empty where nothing is. Damaged ones stay where they are, and
        those that were set aside are not looked at."""
        found = {}
        for path in self._folders():
            if path.suffix in (_PARTIAL, _DAMAGED):
                continue
            try:
                _verify(_open(path))
                found[path.name] = ""
            except (StoreError, OSError) as error:
                found[path.name] = one_sentence(error)
        return found


def format_entries(entries: list[Entry], total: str) -> str:
    """The entries as lines to read, with their sum at the end."""
    lines = [
        f"{gib(entry.size):>11}  used {time.strftime('%Y-%m-%d %H:%M', time.localtime(entry.used))}  "
        f"{entry.manifest['what']}  ({entry.folder.name})"
        for entry in entries
    ]
    count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
    return "\n".join([*lines, f"{gib(sum(entry.size for entry in entries)):>11}  {total}, {count}"])


@contextmanager
def _as_store_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except (OSError, NotImplementedError) as error:
        raise StoreError(f"{folder} cannot be written ({one_sentence(error)})") from error


def _open(folder: Path, hold: Any = None) -> Entry:
    return Entry(folder, read_manifest(folder), (folder / MANIFEST).stat().st_mtime, hold)


def _verify(entry: Entry) -> None:
    """Compare an entry with what was written."""
    check_files(entry.folder, entry.manifest, entry.folder.name)


def _hold(path: Path, alone: bool = False) -> Any:
    """An open file that keeps its entry from being removed by others, or None where there is none or, `alone`, where
    anyone has it open."""
    try:
        file = path.open("rb")
    except OSError:
        return None
    if fcntl is not None:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                raise FileNotFoundError(path)
        except OSError:
            file.close()
            return None
    return file


def _remove(entry: Entry) -> bool:
    """Remove an entry that nobody uses; whether it is gone."""
    hold = _hold(entry.folder / MANIFEST, alone=True)
    if hold is None:
        return False
    if fcntl is None:
        hold.close()
    doomed = entry.folder.with_name(f"{entry.folder.name}-{os.getpid()}{_PARTIAL}")  # which no writer uses
    try:
        os.replace(entry.folder, doomed)
    except OSError:
        return False
    finally:
        hold.close()
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
