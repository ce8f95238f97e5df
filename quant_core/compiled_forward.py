"""A module's forward, compiled for a while."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import is_out_of_memory, one_sentence

logger = logging.getLogger(__name__)

BACKEND = "inductor"  # of torch.compile


@functools.cache
def _function(forward: Callable, backend: str, mode: str, full_graph: bool) -> Callable:
    """One function for all modules of a class, so that they share its graphs and none of them is held by it."""
    return torch.compile(forward, backend=backend, mode=None if mode == "default" else mode, fullgraph=full_graph)


@contextmanager
def compiled_forward(module: nn.Module, mode: str, full_graph: bool, failed: dict[str, str]) -> Iterator[None]:
    """Run a module's forward compiled, as long as this lasts.

    A class that does not compile runs as it is, then and from then on: `failed` has the names of such, and why.
    """
    before = vars(module).get("forward")
    module.forward = _Compiled(module, _function(type(module).forward, BACKEND, mode, full_graph), failed)
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before


class _Compiled:
    """In place of a module's forward: that of its class, compiled, with the module as its first argument. What hooks
    the module has stay outside: streaming, cancelling."""

    def __init__(self, module: nn.Module, function: Callable, failed: dict[str, str]):
        self.module = weakref.ref(module)
        self.function = function
        self.failed = failed
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args, **kwargs):
        module = self.module()
        name = type(module).__name__
        if name not in self.failed:
            from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
            from torch._inductor.exc import InductorError

            try:
                return self.function(module, *_plain(args), **{key: _plain(value) for key, value in kwargs.items()})
            except (TorchDynamoException, InductorError, FailOnRecompileLimitHit) as error:
                inner = getattr(error, "inner_exception", None) or error.__cause__
                if inner is not None and is_out_of_memory(inner):
                    raise inner from None
                self.failed[name] = _reason(error, inner)
                logger.warning("%s runs without compile: %s.", name, self.failed[name])
        return type(module).forward(module, *args, **kwargs)


def _reason(error: Exception, inner: BaseException | None) -> str:
    missing = {"InvalidCxxCompiler": "a C++ compiler, as g++", "TritonMissing": "Triton (pip install triton)"}
    wanted = missing.get(type(inner).__name__) or next(
        (text for kind, text in missing.items() if kind in str(error)), ""
    )
    return f"it needs {wanted}, which is not there" if wanted else one_sentence(error)


def _plain(value: Any) -> Any:
    """The same tensors without what tells apart graphs that compute the same: being a view of another, and the stride
    of a dimension of one element."""
    if type(value) is torch.Tensor:
        value = value.data
        if value.is_contiguous() and value.stride() != (plain := _strides(value.shape)):
            value = torch.as_strided(value, value.shape, plain).data
        return value
    return tuple(map(_plain, value)) if type(value) is tuple else value  # into lists and dicts a module may write


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Of a tensor of that shape without gaps."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()
