"""Where PyTorch keeps what torch.compile made, from one start to the next, and how much it made."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = "compiled"  # within the store
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def kept_in(store: Path | None) -> Iterator[None]:
    """Let torch.compile keep its code in the store, as long as this lasts and unless the user chose a folder for it.

    That code is run when it is found again. So the folder and the store must be the user's own and nobody else may
    write them, or PyTorch's own place, in the folder for temporary files, is left as it is. On Windows, where a user's
    folders are so by default, nothing is checked.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(_VARIABLE)
    chosen = before is not None and before != os.path.abspath(default_cache_dir())  # PyTorch sets it, too
    folder = None if store is None or chosen else _own_folder(store / FOLDER)
    if folder is None:
        yield
        return
    os.environ[_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before


def _own_folder(folder: Path) -> Path | None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = [folder.stat(), folder.parent.stat()]
    except OSError as error:
        logger.info("Compiled code is not kept in the store: %s.", error)
        return None
    if hasattr(os, "getuid") and any(
        part.st_uid != os.getuid() or part.st_mode & (stat.S_IWGRP | stat.S_IWOTH) for part in found
    ):
        logger.warning("Compiled code is not kept in %s, which others can write; chmod 700 it and the store.", folder)
        return None
    return folder.absolute()


def code_size(store: Path) -> int:
    """Bytes of compiled code in a store."""
    return sum(path.stat().st_size for path in (store / FOLDER).rglob("*") if path.is_file())


def remove_code(store: Path) -> None:
    """Remove all compiled code of a store."""
    shutil.rmtree(store / FOLDER, ignore_errors=True)


@dataclass(frozen=True)
class Made:
    """Graphs that torch.compile traced, and how many of them it had to make code for, which it found no code of."""

    graphs: int = 0
    compiled: int = 0

    def since(self, before: Made) -> Made:
        """What was made from then until this."""
        return Made(max(self.graphs - before.graphs, 0), max(self.compiled - before.compiled, 0))


def made() -> Made:
    """What this process has made until now, as PyTorch counts it."""
    from torch._dynamo.utils import counters

    inductor = counters["inductor"]
    return Made(counters["stats"]["unique_graphs"], inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"])
