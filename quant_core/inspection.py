"""What a loaded pipeline really is, read from its weights rather than from the request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from .architecture import empty_model, is_transformers
from .backend import Backend
from .backends import backends, get_backend
from .errors import gib
from .layers import linear_layers
from .pipeline import QuantizedPipeline
from .prequantized import told_spec
from .quantizing import Origin, describe_origin
from .specs import QuantSpec
from .table import aligned

MIB = 2**20
_NOT_QUANTIZED = "not quantized by its checkpoint"
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ComponentReport:
    """One component. Bytes are bytes; counts of layers are of linear layers unless named otherwise."""

    name: str
    class_name: str
    library: str  # the component's class comes from this package
    requested: str  # backend/scheme of the plan, "" if none
    is_quantized: bool  # at least one layer is stored in a quantized format
    method: str  # the backends of the formats found, "" if none
    formats: dict[str, int]  # stored format -> layers
    parameters: int  # weights and buffers as the model counts them, before packing
    footprint: int  # bytes as stored, scales and tables included
    bytes_16bit: int  # the same parameters at two bytes each
    left_out: dict[str, str]  # linear layer that is not quantized -> why
    note: str
    dtype: str
    device: str
    compilable: bool
    origin: str  # checkpoint, file, store, stored or quantized; see quantizing.Origin
    load_seconds: float
    origin_note: str  # why it is not stored


def inspect_pipeline(pipeline: QuantizedPipeline) -> list[ComponentReport]:
    """A report on each component with weights, in the pipeline's order."""
    return [
        _report(name, module, pipeline, pipeline.origins.get(name, Origin("checkpoint", 0.0)))
        for name, module in pipeline.models.items()
    ]


def _report(name: str, module: nn.Module, pipeline: QuantizedPipeline, origin: Origin) -> ComponentReport:
    found: Counter[str] = Counter()
    methods: dict[str, Backend] = {}
    for part in module.modules():
        if backend := _backend_of(part):
            found[str(backend.layer_format(part))] += 1
            methods[backend.name] = backend
    left_out = pipeline.left_out.get(name) or (_unquantized(module) if found else {})
    parameters, info = count_parameters(module), pipeline.index.models[name]
    if info.prequantized and not found:
        plain = empty_model(info)
        if is_transformers(plain):
            plain.tie_weights()
        found, left_out = _foreign(module, plain)
        parameters = count_parameters(plain)
    return ComponentReport(
        name=name,
        class_name=type(module).__name__,
        library=type(module).__module__.split(".")[0],
        requested=str(pipeline.specs.get(name, "")),
        is_quantized=bool(found),
        method=", ".join(sorted(methods)) or (str(info.prequantized) if found else ""),
        formats=dict(found),
        parameters=parameters,
        footprint=footprint(module),
        bytes_16bit=2 * parameters,
        left_out=dict(left_out),
        note=pipeline.notes.get(name, ""),
        dtype=str(next((p.dtype for p in module.parameters() if p.is_floating_point()), "-")).removeprefix("torch."),
        device=str(next(stored_tensors(module)).device),
        compilable=_compilable(pipeline.specs.get(name) or told_spec(info), methods, found),
        origin=origin.kind,
        load_seconds=round(origin.seconds, 3),
        origin_note=origin.note,
    )


def _unquantized(module: nn.Module) -> dict[str, str]:
    return {name: _NOT_QUANTIZED for name, layer in linear_layers(module) if not layer_format(layer)}


def _foreign(module: nn.Module, plain: nn.Module) -> tuple[Counter[str], dict[str, str]]:
    """Stored formats and the linear layers left out, told by the layers that the component had before a library that
    no backend here knows quantized it."""
    parts = dict(module.named_modules())
    weighty = (name for name, part in plain.named_modules() if "weight" in part._parameters)
    formats = {name: foreign_format(parts[name]) for name in weighty if name in parts}
    left_out = {name: _NOT_QUANTIZED for name, _ in linear_layers(plain) if not formats.get(name)}
    return Counter(filter(None, formats.values())), left_out


def _backend_of(module: nn.Module) -> Backend | None:
    return next((backend for backend in backends().values() if backend.layer_format(module)), None)


def layer_format(module: nn.Module) -> str | None:
    """How a layer's weight is stored (`Int8Tensor`, `nf4`, `Q8_0`, ...), None if it is not quantized."""
    backend = _backend_of(module)
    return backend.layer_format(module) if backend else None


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape (out, in) of a linear layer's weight, before it was packed."""
    backend = _backend_of(layer)
    return tuple(backend.weight_shape(layer) if backend else layer.weight.shape)


def foreign_format(module: nn.Module) -> str | None:
    """The dtype of the first tensor of a module that is no plain float, None if all are."""
    own = (*module._parameters.values(), *module._buffers.values())
    packed = [tensor.dtype for tensor in own if tensor is not None and tensor.dtype not in _PLAIN]
    return str(packed[0]).removeprefix("torch.") if packed else None


def count_parameters(module: nn.Module) -> int:
    """Numbers in the module's parameters and persistent buffers before packing, shared ones once."""
    total, packed = 0, set()
    for part in module.modules():
        if backend := _backend_of(part):
            packed.add(id(part.weight))
            total += prod(backend.weight_shape(part))
            hidden = {"input_scale", "output_scale"}  # quanto's, of activations
            packed |= {id(buffer) for name, buffer in part._buffers.items() if name in hidden}
    rest = [tensor for tensor in _own(module) if id(tensor) not in packed]
    return total + sum(tensor.numel() for tensor in rest)


def footprint(module: nn.Module) -> int:
    """Bytes of the module's weights as stored, shared ones once, looking inside tensor subclasses."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(module))


def stored_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """The plain tensors that hold the module's weights, each storage once."""
    seen = set()
    for tensor in _flat([*_own(module), *_hidden(module)]):
        place = (tensor.device, tensor.data_ptr(), tensor.numel())
        if place not in seen or tensor.is_meta:
            seen.add(place)
            yield tensor


def _own(module: nn.Module) -> list[torch.Tensor]:
    buffers = [
        buffer
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    ]
    return [*module.parameters(), *buffers]


def _hidden(module: nn.Module) -> Iterator[torch.Tensor]:
    for part in module.modules():
        if backend := _backend_of(part):
            yield from backend.hidden_tensors(part)


def _flat(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (torch.Tensor, nn.Parameter):
            yield from _flat(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        elif tensor.numel():
            yield tensor


def report_data(reports: list[ComponentReport]) -> dict[str, Any]:
    """The reports as plain data for JSON, with totals."""
    return {
        "components": [asdict(report) for report in reports],
        "footprint": sum(report.footprint for report in reports),
        "bytes_16bit": sum(report.bytes_16bit for report in reports),
    }


def format_report(reports: list[ComponentReport]) -> str:
    """The reports as an aligned table, with what was left out below it."""
    head = ("component", "class", "quantization", "stored", "of 16 bit", "dtype", "device", "compiles", "layers")
    rows = [head]
    for report in reports:
        layers = ", ".join(f"{count} {name}" for name, count in sorted(report.formats.items()))
        rest = f"{len(report.left_out)} left out" if report.left_out else ""
        rows.append(
            (
                report.name,
                report.class_name,
                report.requested or report.method or "-",
                gib(report.footprint),
                f"{report.footprint / max(report.bytes_16bit, 1):.1%}",
                report.dtype,
                report.device,
                "yes" if report.compilable else "no",
                " + ".join(filter(None, (layers, rest))) or "-",
            )
        )
    stored, full = (sum(getattr(report, key) for report in reports) for key in ("footprint", "bytes_16bit"))
    rows.append(("total", "", "", gib(stored), f"{stored / max(full, 1):.1%}", "", "", "", ""))
    lines = aligned(rows, right=(3, 4))
    for report in reports:
        if report.requested:
            told = Origin(report.origin, report.load_seconds, report.origin_note)
            lines.append(describe_origin(report.name, report.requested, told))
        if report.note:
            lines.append(f"{report.name} {report.note}")
        for reason, count in Counter(report.left_out.values()).items():
            names = [name for name, why in report.left_out.items() if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"{report.name}: {count} left out, {reason}: {shown}")
    return "\n".join(lines)


def _compilable(spec: QuantSpec | None, methods: Mapping[str, Backend], found: Mapping[str, int]) -> bool:
    """Whether torch.compile is known to work on a component's layers."""
    if spec is None:
        return bool(methods or not found) and not any(
            scheme.uncompilable for backend in methods.values() for scheme in backend.schemes
        )
    return not any(get_backend(spec.backend).scheme(name).uncompilable for name in spec.schemes)
