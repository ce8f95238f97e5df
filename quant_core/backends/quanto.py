"""optimum-quanto: quantized modules that run on any device; diffusers will drop it in its 1.0."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace

from ..architecture import is_transformers
from ..backend import Backend, Export, Packed, Scheme, Upstream, Workspace, upstream_options
from ..errors import SourceError, SpecError
from ._inputs import keep_contiguous
from ._slices import by_rows, is_large

_QTYPES = {"int8": "qint8", "int4": "qint4", "int2": "qint2", "float8": "qfloat8_e4m3fn"}


@cache
def _do_without_a_compiler():
    """Keep quanto from building its extensions in the middle of the first picture, which takes minutes, a compiler
    and, for CUDA, nvcc. All that its plain formats need of them is `unpack`. The formats of its own kernels, which a
    weight that moves is turned into, want more: they go with the extension. One that is built already stays."""
    from optimum.quanto.library.extensions.extension import _extensions

    for name in ("quanto_cpp", "quanto_cuda", "quanto_hip"):
        extension = _extensions.get(name)
        if extension and extension._lib is None and not _is_built(extension):
            extension._lib = SimpleNamespace(unpack=_unpack)
            del _extensions[name]


def _is_built(extension):
    import torch

    version = Path(extension.build_directory, "pytorch_version.txt")
    return version.exists() and version.read_text().strip() == torch.__version__


def _unpack(packed, bits):
    """Values of 2 or 4 bits out of uint8, low bits first, as optimum-quanto's library/unpack.py does."""
    import torch

    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def quantize(linear, recipe):
    from optimum import quanto

    qtype = quanto.qtypes[_QTYPES[recipe.scheme]]
    layer = quanto.QLinear.from_module(linear, weights=qtype)
    if is_large(layer.weight):
        return _with_weight(layer, _by_rows(layer))
    scale, shift = _bounds(layer, layer.weight)
    # Not as a kernel of this device wants it: that could neither be copied to another nor be stored without loss.
    weight = quanto.quantize_weight(layer.weight, qtype, 0, scale, shift, **_grouped(layer), optimized=False)
    return _with_weight(layer, weight)


def _bounds(layer, rows):
    bounds = layer.optimizer(rows, qtype=layer.weight_qtype, axis=0, **_grouped(layer))
    return bounds if isinstance(bounds, tuple) else (bounds, None)


def _by_rows(layer):
    """The weight as `quantize_weight` makes it, whose packing of small values goes across all rows."""
    import torch
    from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor
    from optimum.quanto.tensor.weights.qbytes import WeightQBytesTensor

    qtype, weight, group = layer.weight_qtype, layer.weight.data, layer.weight_group_size

    def in_bytes(rows):
        scale, _ = _bounds(layer, rows)
        return torch.ops.quanto.quantize_symmetric(rows, qtype.dtype, 0, scale), scale

    def in_bits(rows):
        scale, shift = _bounds(layer, rows)
        return torch.ops.quanto.quantize_affine(rows, qtype.bits, 0, group, scale, shift), scale, shift

    if qtype.bits == 8:
        return WeightQBytesTensor(qtype, 0, weight.size(), weight.stride(), *by_rows(weight, in_bytes), None)
    return WeightQBitsTensor(qtype, 0, group, weight.size(), weight.stride(), *by_rows(weight, in_bits))


def _grouped(layer):
    return {"group_size": layer.weight_group_size} if layer.weight_qtype.bits < 8 else {}


def _with_weight(layer, weight):
    import torch

    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    _prepare(layer)
    return layer


def _prepare(layer):
    """Let a layer run without a compiler, and on views: torch._weight_int8pack_mm takes no gaps within a row."""
    _do_without_a_compiler()
    if layer_format(layer) == "qint8":
        keep_contiguous(layer)


def pack(layer):
    """As optimum-quanto writes it: `weight._data`, `weight._scale` and so on, `input_scale` and `output_scale`."""
    tensors = {}
    layer._save_to_state_dict(tensors, "", False)
    tensors.pop("bias", None)
    return Packed(tensors, {})


def unpack(linear, packed, recipe):
    """The layer again, which computes in the dtype of its scales only."""
    from optimum import quanto
    from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor
    from optimum.quanto.tensor.weights.qbytes import WeightQBytesTensor

    if (stored := packed.tensors["weight._scale"].dtype) != recipe.dtype:
        stored, wanted = (str(dtype).removeprefix("torch.") for dtype in (stored, recipe.dtype))
        raise SourceError(f"Its quanto weights are made for {stored} and not for {wanted}; load it in {stored}.")
    qtype = quanto.qtypes[_QTYPES[recipe.scheme]]
    layer = quanto.QLinear.qcreate(linear, qtype, None, None, device="meta")
    tensors, missing = {name: _aligned(tensor) for name, tensor in packed.tensors.items()}, []
    form = {"qtype": qtype, "axis": 0, "size": layer.weight.size(), "stride": layer.weight.stride()}
    if qtype.bits == 8:
        weight = WeightQBytesTensor.load_from_state_dict(
            tensors, "weight.", **form, activation_qtype=None, missing_keys=missing
        )
    else:
        weight = WeightQBitsTensor.load_from_state_dict(
            tensors, "weight.", **form, **_grouped(layer), missing_keys=missing
        )
    layer.input_scale, layer.output_scale, layer.bias = tensors["input_scale"], tensors["output_scale"], linear.bias
    return _with_weight(layer, weight)


def export(model, layers, left_out):
    schemes = {name: recipe.scheme for name, recipe in layers.items()}
    scheme, *others = dict.fromkeys(schemes.values())
    mixed = {"mixed": {name: own for name, own in schemes.items() if own != scheme}} if others else {}
    if is_transformers(model):
        from transformers import QuantoConfig

        config = QuantoConfig(weights=scheme, modules_to_not_convert=sorted(left_out))
        return Export(_plain(config) | mixed, (), "transformers reads no quanto checkpoint")
    from diffusers import QuantoConfig

    skipped = {name.rpartition(".")[2] for name in left_out}  # which is what diffusers compares
    config = _plain(QuantoConfig(weights_dtype=scheme, modules_to_not_convert=sorted(skipped)))
    if mixed:
        return Export(config | mixed, (), "diffusers reads one quanto scheme per component")
    also = sorted(path for path in layers if path.rpartition(".")[2] in skipped)
    obstacle = f"diffusers cannot leave out one {also[0].rpartition('.')[2]} and not {also[0]}" if also else ""
    return Export(config, (), obstacle)


def _plain(config):
    return {name: getattr(value, "value", value) for name, value in config.to_dict().items()}


def reads(config):
    """What diffusers' and transformers' QuantoConfig says."""
    if config.get("quant_method") != "quanto" or config.get("activations"):
        return None
    return config.get("weights_dtype") or config.get("weights") or "int8", {}


def _aligned(tensor):
    """On a boundary of 16 bytes, where torch._weight_int8pack_mm has to find it; see `settle`."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def unfit(recipe, out_features, in_features):
    if recipe.device.type == "cpu" and recipe.scheme == "int8" and in_features % 16:
        # torch._weight_int8pack_mm reads rows as aligned vectors of 16 bytes and crashes the interpreter else.
        return f"in_features {in_features} is not a multiple of 16"
    if recipe.scheme in ("int4", "int2") and in_features % 32:
        return f"in_features {in_features} is not a multiple of 32"
    return ""


def settle(model):
    """Make weights read from a checkpoint safe for torch._weight_int8pack_mm, which reads rows as vectors of 16 bytes:
    memory-mapped ones stand anywhere, and a row of another length shifts all that follow. Either ends the process."""
    import torch

    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if layer_format(module):
            _prepare(module)
        # The wrapper may say meta: diffusers makes it there, around data that is not.
        if layer_format(module) != "qint8" or weight._data.device.type != "cpu":
            continue
        if module.in_features % 16 == 0:
            weight._data = _aligned(weight._data)
        else:
            linear = torch.nn.Linear(module.in_features, module.out_features, False, device="meta")
            linear.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
            linear.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)


def layer_format(module):
    if not type(module).__module__.startswith("optimum.quanto") or getattr(module, "weight_qtype", None) is None:
        return None
    return module.weight_qtype.name if hasattr(module.weight, "__tensor_flatten__") else None


def stored(recipe, out_features, in_features):
    """Packed weights, a scale per row, or a scale and a shift per group of 128 or as many as divide a row, and the
    two scales that every layer has for activations."""
    weights, size = out_features * in_features, recipe.dtype.itemsize
    if recipe.scheme in ("int8", "float8"):
        return weights + (out_features + 2) * size
    group = 128
    while in_features % group and group > 32:
        group -= 32
    groups = weights // (group if in_features > 128 and in_features % group == 0 else in_features)
    return weights // (2 if recipe.scheme == "int4" else 4) + (2 * groups + 2) * size


def workspace(recipe, rows, out_features, in_features):
    """The weight, unpacked and scaled; measured on the CPU, where int8 in bfloat16 has a kernel that needs nothing."""
    import torch

    weights, size = out_features * in_features, recipe.dtype.itemsize
    if recipe.device.type == "cpu" and recipe.dtype == torch.bfloat16 and recipe.scheme == "int8":
        return Workspace(0, 0)
    packed = 1 if recipe.scheme in ("int4", "int2") else 0
    return Workspace(weights * (2 * size + packed), weights * size)


def upstream(name, arguments):
    if name not in ("quanto", "QuantoConfig"):
        return None
    known = {"weights_dtype": "scheme", "weights": "scheme", "modules_to_not_convert": "skip_modules"}
    options = upstream_options(name, arguments, known | {"activations": "activations"})
    if options.pop("activations", None) is not None:
        raise SpecError("quanto activations need calibration and are not supported; leave them out.")
    return Upstream(options.pop("scheme", "int8"), {}, options.pop("skip_modules", ()))


_LEGACY = "optimum-quanto is no longer developed"

BACKEND = Backend(
    name="quanto",
    title="optimum-quanto",
    requires=("optimum-quanto>=0.2.7",),
    schemes=(
        Scheme("int8", bits=8, help="8-bit integers, one scale per row.", avoid=_LEGACY),
        Scheme(
            "int4",
            bits=4,
            help="4-bit integers in groups; slow to quantize on a CPU.",
            avoid=_LEGACY,
            uncompilable="torch.compile fails on its packed weights",
            immovable="its weights are packed for the device they are on",
        ),
        Scheme("int2", bits=2, help="2-bit integers in groups; visibly worse pictures.", avoid=_LEGACY),
        Scheme("float8", bits=8, help="8-bit floating point (e4m3), one scale per row.", avoid=_LEGACY),
    ),
    quantize=quantize,
    layer_format=layer_format,
    weight_shape=lambda module: tuple(module.weight.shape),
    stored=stored,
    workspace=workspace,
    unfit=unfit,
    settle=settle,
    pack=pack,
    unpack=unpack,
    export=export,
    mark="input_scale",
    reads=reads,
    upstream=upstream,
    group_offload="diffusers moves no quanto tensors in groups",
    mixes=True,
    notice="Legacy: optimum-quanto is in maintenance mode and diffusers will remove it in 1.0; prefer torchao.",
    tells_dtype=True,
)
