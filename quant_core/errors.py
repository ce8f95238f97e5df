"""What can go wrong, by who can fix it. The message is what the user reads, so it names the remedy."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

_NO_MEMORY = re.compile(r"out of memory|(can't allocate|not enough) memory|_ALLOC_FAILED")


def _shown(module: str) -> str:
    """The module that an error's type is shown with. A host that loaded the pack has its path there otherwise."""
    return module if __name__ == "quant_core.errors" else "quantized_diffusers"


class QuantError(Exception):
    """Base of every error the engine raises on purpose."""

    __module__ = _shown(__name__)

    def __init_subclass__(cls, **settings):
        super().__init_subclass__(**settings)
        cls.__module__ = _shown(cls.__module__)


class SpecError(QuantError, ValueError):
    """The request is wrong: an unknown backend, scheme, option, component, layer or argument."""


class SourceError(QuantError, ValueError):
    """The source is not a diffusers pipeline, lacks a component, or cannot be trusted."""


class BackendUnavailable(QuantError, ImportError):
    """The backend's package is missing, too old or broken."""


class DeviceUnsupported(QuantError, RuntimeError):
    """The backend or scheme does not run on this device."""


class StoreError(QuantError, OSError):
    """A store or a folder of quantized components cannot be used: a full disk, a damaged entry."""


class DamagedEntry(StoreError):
    """An entry of the store is not what was written, or of another version."""


class Stopped(BaseException):
    """What a host's callback raised, on its way through code that handles errors of its own."""


def stopping(callback: Callable[..., None] | None) -> Callable[..., None]:
    """A callback of a host, whose errors nothing on the way takes for its own."""

    def call(*arguments: Any) -> None:
        if callback is None:
            return
        try:
            callback(*arguments)
        except BaseException as error:
            raise Stopped from error

    return call


@contextmanager
def stoppable() -> Iterator[None]:
    """Let a host's own error out."""
    try:
        yield
    except Stopped as stopped:
        error = stopped.__cause__
    else:
        return
    raise error


def choices(values: Iterable[str]) -> str:
    """The values as a sorted list to read."""
    return ", ".join(sorted(values)) or "none"


def did_you_mean(name: str, values: Iterable[str]) -> str:
    """The nearest of the values as a hint, or nothing."""
    near = difflib.get_close_matches(name, list(values), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_sentence(error: BaseException) -> str:
    """The first line of a library's error, which may run over a page."""
    text = (
        f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    )  # the key alone says little
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:300]


def shortened(text: str, most: int) -> str:
    """The text, or its start, of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def gib(count: float) -> str:
    """A number of bytes to read."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is an allocator's own out-of-memory error, which hosts handle and nobody may wrap.

    Those of the CPU, of cuBLAS, cuDNN and MPS are RuntimeErrors, told by their texts.
    """
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return (
        isinstance(error, RuntimeError) and not isinstance(error, QuantError) and bool(_NO_MEMORY.search(str(error)))
    )


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """What is only told must not fail what it tells of: log the error of any library, but for out-of-memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        logger.debug("There is no %s: %s.", what, one_sentence(error))
