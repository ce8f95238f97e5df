"""What components need beside their weights while a pipeline runs, seen by running it with components that hold none.

Inside of components tensors are on PyTorch's meta device, where they have shapes and no bytes; everything else, as
schedulers and tokenizers, is computed for real, on the CPU, from zeros.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .allocator import forget_cached
from .arrays import arrays_of
from .backend import Workspace
from .errors import SpecError, is_out_of_memory, one_sentence
from .live_bytes import Kernels, Live, on_meta
from .unchanged import unchanged

_CPU = torch.device("cpu")
_ENTRIES = ("forward", "encode", "decode")  # by which pipelines use a component

OfRows = Callable[[int], Workspace]  # what a layer takes for so many rows of input


@dataclass
class DryRun:
    """What was seen: by component the most bytes that one use took beside its weights, its inputs and outputs among
    them; what the pipeline returned, of zeros; and why it stopped before its end, if it did, and inside of which
    component, if it was inside of one."""

    peaks: dict[str, int] = field(default_factory=dict)
    result: Any = None
    failure: str = ""
    unfinished: str = ""


def dry_run(
    pipe: Any,
    models: Mapping[str, nn.Module],
    arguments: Mapping[str, Any],
    workspaces: Mapping[nn.Linear, OfRows],
    device: torch.device,
) -> DryRun:
    """Call a pipeline whose components, `models`, are on the meta device, as if they were on `device`.

    `workspaces` tells of linear layers that stand for quantized ones what those take. Uses of a component with the
    same shapes are computed once. Nothing is left in the pipeline or its components afterwards.

    Raises:
        SpecError: the pipeline refuses its arguments.
    """
    run, live = DryRun(), Live(device)
    try:
        with (
            unchanged(pipe),
            _prepared(models, workspaces, run, live),
            Kernels(device),
            live,
            arrays_of(arguments),
        ):
            run.result = pipe(**arguments)
    except Exception as error:  # what code raises that reads values where there are only shapes
        if is_out_of_memory(error):
            raise
        if isinstance(error, (TypeError, ValueError)) and not run.peaks:
            raise SpecError(f"{type(pipe).__name__} refuses the request: {one_sentence(error)}.") from error
        run.failure = one_sentence(error)
    finally:
        for model in models.values():
            forget_cached(model.modules())
    return run


@contextmanager
def _prepared(
    models: Mapping[str, nn.Module], workspaces: Mapping[nn.Linear, OfRows], run: DryRun, live: Live
) -> Iterator[None]:
    """Components that count what they take, as long as this lasts."""
    hook = SimpleNamespace(execution_device=_CPU, pre_forward=lambda module, *args, **kwargs: (args, kwargs))
    try:
        for name, model in models.items():
            model._hf_hook = hook  # diffusers asks it for the device
            for entry in _ENTRIES:
                if hasattr(model, entry):
                    setattr(model, entry, _measured(name, getattr(model, entry), run, live))
        for layer, of_rows in workspaces.items():
            layer.forward = functools.partial(_multiply, layer, of_rows, live)
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for part in (*models.values(), *workspaces):
            for name in ("_hf_hook", *_ENTRIES):
                vars(part).pop(name, None)


def _multiply(layer: nn.Linear, of_rows: OfRows, live: Live, values: torch.Tensor) -> torch.Tensor:
    unpacking, multiplying = of_rows(values.numel() // layer.in_features)
    live.add(unpacking)
    live.add(multiplying - unpacking)
    result = nn.functional.linear(values, layer.weight, layer.bias)
    live.add(-multiplying)
    return result


def _measured(name: str, method: Callable[..., Any], run: DryRun, live: Live) -> Callable[..., Any]:
    """The method, for CPU tensors outside of it and meta tensors inside."""
    known: dict[str, Any] = {}

    @functools.wraps(method)
    def use(*args, **kwargs):
        if live.inside:
            return method(*args, **kwargs)
        key = repr(_each_tensor((args, kwargs), lambda tensor: (tuple(tensor.shape), tensor.dtype)))
        if key not in known:
            try:
                with live.counting():
                    entered = _each_tensor((args, kwargs), live.enter)
                    known[key] = _each_tensor(method(*entered[0], **entered[1]), on_meta)
            except Exception:
                run.unfinished = name
                raise
            finally:
                run.peaks[name] = max(run.peaks.get(name, 0), live.peak)
        return _each_tensor(known[key], lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))

    return use


def _each_tensor(value: Any, convert: Callable[[torch.Tensor], Any]) -> Any:
    """The value with each tensor in it converted, also inside of what models return."""
    if isinstance(value, torch.Tensor):
        return convert(value)
    if type(value) in (list, tuple):
        return type(value)(_each_tensor(item, convert) for item in value)
    if type(value) is dict:
        return {key: _each_tensor(item, convert) for key, item in value.items()}
    if isinstance(value, dict):  # the outputs of both libraries are dictionaries with attributes
        return type(value)(**{key: _each_tensor(item, convert) for key, item in value.items()})
    attributes = getattr(value, "__dict__", {})
    if any(isinstance(item, torch.Tensor) for item in attributes.values()):  # as a VAE's distribution
        value = copy.copy(value)
        vars(value).update({key: _each_tensor(item, convert) for key, item in attributes.items()})
    return value
