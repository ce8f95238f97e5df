"""Each linear layer of a loaded pipeline: how it is stored, and how far it is from what it was quantized from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .allocator import give_back
from .architecture import empty_model
from .availability import quiet_libraries
from .checkpoint import weight_files
from .errors import is_out_of_memory, one_sentence, stoppable, stopping
from .inspection import (
    ComponentReport,
    count_parameters,
    footprint,
    foreign_format,
    inspect_pipeline,
    layer_format,
    weight_shape,
)
from .layers import linear_layers
from .pipeline import QuantizedPipeline
from .reading import read_mapped
from .table import aligned

ROWS, SEED = 32, 0  # of the inputs that errors are measured with

OnLayer = Callable[[int, int, str], None]  # layers done, of all to measure, which one; raise to stop


@dataclass(frozen=True)
class LayerReport:
    """One linear layer. Bytes are bytes, those of its bias included."""

    component: str
    name: str
    shape: tuple[int, int]  # (out, in) features
    format: str  # as stored, or its dtype
    is_quantized: bool
    footprint: int  # bytes as stored
    bytes_16bit: int
    left_out: str  # why it is not quantized in a component that is
    error: float | None = None  # relative error of its outputs, None where it was not measured
    error_note: str = ""  # why it could not be


def inspect_layers(
    pipeline: QuantizedPipeline, errors: bool = False, on_progress: OnLayer | None = None
) -> list[LayerReport]:
    """A report on each linear layer, components in the pipeline's order and layers in the model's.

    With `errors` each quantized layer is run on `ROWS` rows of normal noise, the same for all layers of a width, next
    to the layer as its checkpoint has it, both in the pipeline's dtype: the error is norm(quantized - original) /
    norm(original) of the outputs. It counts what a scheme does to activations, and rounding in that dtype. Layers run
    on the device where they are. The checkpoint is memory-mapped and read one layer at a time, but for what
    `read_mapped` cannot map. The pipeline remembers its errors, so each is measured once. `on_progress` is called
    before each layer and at the end; what it raises stops it.
    """
    found = [layer for report in inspect_pipeline(pipeline) for layer in _stored(pipeline, report)]
    if not errors:
        return found
    wanted = [layer for layer in found if layer.is_quantized and _key(layer) not in pipeline.errors]
    notes = _measure(pipeline, wanted, stopping(on_progress)) if wanted else {}
    return [
        replace(layer, error=pipeline.errors.get(_key(layer)), error_note=notes.get(_key(layer), ""))
        for layer in found
    ]


def _key(layer: LayerReport) -> tuple[str, str]:
    return layer.component, layer.name


def _stored(pipeline: QuantizedPipeline, report: ComponentReport) -> Iterator[LayerReport]:
    module, describe = pipeline.models[report.name], layer_format
    listed = dict(linear_layers(module))
    whole = listed
    if report.is_quantized and not any(map(layer_format, listed.values())):  # by a library that no backend here knows
        whole = dict(linear_layers(empty_model(pipeline.index.models[report.name])))
        parts, describe = dict(module.named_modules()), foreign_format
        listed = {name: parts[name] for name in whole if name in parts}
    for name, layer in listed.items():
        stored = describe(layer)
        yield LayerReport(
            component=report.name,
            name=name,
            shape=weight_shape(whole[name]),
            format=str(stored or layer.weight.dtype).removeprefix("torch."),
            is_quantized=bool(stored),
            footprint=footprint(layer),
            bytes_16bit=2 * count_parameters(whole[name]),
            left_out=report.left_out.get(name, ""),
        )


def _measure(pipeline: QuantizedPipeline, layers: list[LayerReport], tell: OnLayer) -> dict[tuple[str, str], str]:
    """Put the layers' errors into `pipeline.errors`; returns why some have none."""
    notes, read, original, why = {}, "", None, ""
    with stoppable(), torch.inference_mode(False), torch.no_grad(), quiet_libraries():
        for done, layer in enumerate(layers):
            tell(done, len(layers), ".".join(_key(layer)))
            if read != layer.component:
                original = None  # before the next one comes
                read, (original, why) = layer.component, _original(pipeline, layer.component)
            error, note = None, why
            if original is not None:
                part = pipeline.models[layer.component].get_submodule(layer.name)
                error, note = _error(part, original.get_submodule(layer.name), pipeline.dtype)
            if error is None:
                notes[_key(layer)] = note
            else:
                pipeline.errors[_key(layer)] = error
        tell(len(layers), len(layers), "")
    del original
    give_back()
    return notes


def _original(pipeline: QuantizedPipeline, name: str) -> tuple[nn.Module | None, str]:
    """The component as its checkpoint has it, or why there is none."""
    info, origin = pipeline.index.models[name], pipeline.origins.get(name)
    if info.prequantized:
        return None, "its checkpoint is quantized already, and has no 16-bit weights"
    if origin is not None and origin.kind == "file":
        return None, "it comes from a file that is quantized already, and has no 16-bit weights"
    try:
        return read_mapped(info, pipeline.dtype, weight_files(info, pipeline.variant)), ""
    except Exception as error:  # a checkpoint may be gone or changed since the load, and the libraries raise anything
        if is_out_of_memory(error):
            raise
        return None, f"its 16-bit weights cannot be read: {one_sentence(error)}"


def _error(layer: nn.Module, original: nn.Linear, dtype: torch.dtype) -> tuple[float | None, str]:
    """The relative error of a layer, or why there is none."""
    try:
        error = _relative_error(layer, original.weight, original.bias, dtype)
    except Exception as failed:  # a format may run on another device than the one where the layer is now
        if is_out_of_memory(failed):
            raise
        return None, f"it does not run on {layer.weight.device}: {one_sentence(failed)}"
    return (error, "") if math.isfinite(error) else (None, "its outputs are not finite")


def _relative_error(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> float:
    device = layer.weight.device
    noise = torch.randn(ROWS, weight.shape[1], generator=torch.Generator().manual_seed(SEED)).to(device, dtype)
    bias = bias if bias is None else bias.to(device, dtype)
    expected = functional.linear(noise, weight.to(device, dtype), bias).float()
    made = layer.forward(noise).float()  # not by a call, whose hooks have a host bring the component to its device
    distance, size = (made - expected).norm().item(), expected.norm().item()
    return distance / size if distance else 0.0


def layer_data(layers: list[LayerReport]) -> dict[str, list[dict[str, Any]]]:
    """The reports as plain data for JSON, by component."""
    names = dict.fromkeys(layer.component for layer in layers)
    return {name: [asdict(layer) for layer in layers if layer.component == name] for name in names}


def percent(error: float) -> str:
    """A relative error to read."""
    return f"{100 * error:.2f}%" if error >= 1e-4 or not error else f"{100 * error:.0e}%"


def format_layers(layers: list[LayerReport]) -> str:
    """The reports as an aligned table."""
    rows = [("component", "layer", "out x in", "format", "bytes", "of 16 bit", "error", "")]
    for layer in layers:
        rows.append(
            (
                layer.component,
                layer.name,
                "{} x {}".format(*layer.shape),
                layer.format,
                f"{layer.footprint:,}",
                f"{layer.footprint / max(layer.bytes_16bit, 1):.1%}",
                percent(layer.error) if layer.error is not None else "-",
                layer.left_out or layer.error_note,
            )
        )
    return "\n".join(aligned(rows, right=(2, 4, 5, 6)))
