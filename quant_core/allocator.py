"""Memory that was freed, given back to the operating system."""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def give_back() -> None:
    """Return what the C library and PyTorch's page-locked pool keep of freed memory.

    glibc keeps most of what quantizing a model freed, more than the quantized model itself, and would for good.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        getattr(torch._C, "_host_emptyCache", lambda: None)()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def let_go(error: BaseException) -> None:
    """Drop the tensors in the finished calls of an exception's traceback, which whoever handles it would keep alive.

    The lines of the traceback stay.
    """
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        for frame, _ in traceback.walk_tb(link.__traceback__):
            with suppress(RuntimeError):  # of a call that is not over
                frame.clear()
                _ = frame.f_locals  # before Python 3.13 a copy is kept once locals() was called, and renewed by this
        links += [link.__cause__, link.__context__]


def forget_cached(modules: Iterable[Any]) -> None:
    """Empty the caches that some models keep on their classes' methods (Qwen-Image's rotary embeddings): they hold
    the model and tensors on its device for as long as the program runs."""
    classes = {cls for module in modules for cls in type(module).__mro__}
    for cls in classes:
        if cls.__module__.split(".")[0] in ("diffusers", "transformers"):
            for method in vars(cls).values():
                cells = getattr(method, "__closure__", None) or ()
                for found in (method, *(cell.cell_contents for cell in cells)):
                    if callable(clear := getattr(found, "cache_clear", None)):
                        clear()


@contextmanager
def clean(made: dict[str, Any]) -> Iterator[None]:
    """Give back what making something freed; where it fails, with all that was `made`."""
    try:
        yield
    except BaseException as error:
        made.clear()
        let_go(error)
        raise
    finally:
        give_back()


def _malloc_trim():
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
