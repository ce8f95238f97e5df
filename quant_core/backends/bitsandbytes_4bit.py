"""bitsandbytes 4-bit: blocks of 64 weights on a 16-value grid, as in QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

import functools
from copy import copy as shallow_copy

from ..backend import Backend, Option, Packed, Scheme, Upstream, Workspace
from . import _bitsandbytes
from ._slices import by_rows, is_large

_BLOCK = 64  # weights that share a scale


def quantize(linear, recipe):
    import bitsandbytes as bnb

    weight, quantized = linear.weight.data, {}
    if is_large(blocks := weight.reshape(-1, _BLOCK)):
        quantized["bnb_quantized"] = True
        weight, quantized["quant_state"] = _by_blocks(blocks, weight.shape, recipe)
    # No module=: the weight would hold its layer, and only the garbage collector would free them.
    weight = bnb.nn.Params4bit(weight, requires_grad=False, **quantized, **_settings(recipe)).to(recipe.device)
    return _layer(linear, weight, recipe)


def _by_blocks(blocks, shape, recipe):
    """The packed weight and its state, as bitsandbytes' `quantize_4bit` makes them, whose scales of scales need all
    scales at once."""
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    settings = _settings(recipe) | {"compress_statistics": False, "blocksize": _BLOCK}

    def quantized(rows):
        packed, state = quantize_4bit(rows, **settings)
        return packed, state.absmax

    packed, scales = by_rows(blocks, quantized)
    _, state = quantize_4bit(blocks[:1], **settings)
    state.shape, state.absmax = shape, scales
    if recipe.options["double_quant"]:
        state.nested, state.offset = True, scales.mean()
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=256)
    return packed, state


def _settings(recipe):
    import torch

    return {
        "compress_statistics": recipe.options["double_quant"],
        "quant_type": recipe.scheme,
        "quant_storage": getattr(torch, recipe.options["quant_storage"]),
    }


def _layer(linear, weight, recipe):
    import bitsandbytes as bnb
    import torch

    compute = recipe.options["compute_dtype"]
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=recipe.dtype if compute == "auto" else getattr(torch, compute),
        device="meta",
        **_settings(recipe),
    )
    settle(layer)
    layer.weight, layer.bias = weight, linear.bias
    return layer


def pack(layer):
    """As bitsandbytes writes it: `weight`, and its state as `weight.absmax` and so on. The bytes are uint8 whatever
    they pretend to be, as diffusers reads back no other."""
    import torch

    state = layer.weight.quant_state.as_dict(packed=True)
    data = layer.weight.data.reshape(-1).view(torch.uint8).reshape(-1, 1)
    return Packed({"weight": data, **{f"weight.{name}": value for name, value in state.items()}}, {})


def unpack(linear, packed, recipe):
    import bitsandbytes as bnb

    tensors = dict(packed.tensors)
    data = tensors.pop("weight").reshape(-1).view(_settings(recipe)["quant_storage"]).reshape(-1, 1)
    state = {name.removeprefix("weight."): value for name, value in tensors.items()}
    weight = bnb.nn.Params4bit.from_prequantized(data, state, requires_grad=False, device="cpu")
    return _layer(linear, weight, recipe)


def export(model, layers, left_out):
    recipe = next(iter(layers.values()))  # that of all
    compute = recipe.options["compute_dtype"]
    arguments = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": recipe.scheme,
        "bnb_4bit_use_double_quant": recipe.options["double_quant"],
        "bnb_4bit_compute_dtype": str(recipe.dtype).removeprefix("torch.") if compute == "auto" else compute,
        "bnb_4bit_quant_storage": "uint8",
    }
    return _bitsandbytes.export(model, layers, left_out, arguments)


def reads(config):
    """What transformers' and diffusers' BitsAndBytesConfig says, with its defaults."""
    if config.get("quant_method") != "bitsandbytes" or not config.get("load_in_4bit"):
        return None
    storage = config.get("bnb_4bit_quant_storage") or "uint8"
    return config.get("bnb_4bit_quant_type") or "fp4", {
        "double_quant": bool(config.get("bnb_4bit_use_double_quant")),
        "compute_dtype": config.get("bnb_4bit_compute_dtype") or "float32",
        "quant_storage": "int8" if storage == "uint8" else storage,
    }


def dequantize(layer):
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def settle(model):
    """Switch off the CPU kernel for AVX512-BF16, which repacks a weight at its first use and rounds its scales to
    bfloat16, so that a model that ran once is saved, moved and repeated differently."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.__class__ = _layer_class()


@functools.cache
def _layer_class():
    """bitsandbytes' layer, called as PyTorch's is, which hands over its bytes as what they are: its kernels take them
    by any name, what they tell torch.compile of themselves does not."""
    import bitsandbytes as bnb
    import torch

    class Linear4bit(bnb.nn.Linear4bit):
        def forward(self, input):
            values = input if self.compute_dtype is None else input.to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(values.dtype)
            weight = self.weight
            data = weight.data.view(torch.uint8)
            return bnb.matmul_4bit(values, data, bias=bias, quant_state=weight.quant_state).to(input.dtype)

    return Linear4bit


def transfer(layer, copy, device):
    """The weight with its scales and tables, which bitsandbytes itself would move in place."""
    import torch

    old = layer.weight
    weight = torch.Tensor._make_subclass(type(old), copy(old.data), False)
    vars(weight).update(vars(old), quant_state=_copied(old.quant_state, copy))
    return {"weight": weight}


def _copied(state, copy):
    new = shallow_copy(state)
    for name in ("absmax", "code", "offset"):
        if getattr(state, name) is not None:
            setattr(new, name, copy(getattr(state, name)))
    if state.state2 is not None:
        new.state2 = _copied(state.state2, copy)
    return new


def layer_format(module):
    weight = getattr(module, "weight", None)
    if type(weight).__name__ != "Params4bit" or not weight.bnb_quantized:
        return None
    return f"{weight.quant_type}{' double quant' if weight.quant_state.nested else ''}"


def stored(recipe, out_features, in_features):
    """Half a byte per weight, a float32 per block of 64 or, double quantized, a byte per block and a float32 per 256
    of them, and the tables of values."""
    weights = out_features * in_features
    blocks = -(-weights // 64)
    table = 16 * 4
    if recipe.options["double_quant"]:
        return -(-weights // 2) + blocks + -(-blocks // 256) * 4 + 256 * 4 + 4 + table
    return -(-weights // 2) + blocks * 4 + table


def workspace(recipe, rows, out_features, in_features):
    """The whole weight, and its scales where they are quantized; measured on the CPU. On CUDA, single rows and a few
    shapes are multiplied without unpacking."""
    import torch

    compute = recipe.options["compute_dtype"]
    dtype = recipe.dtype if compute == "auto" else getattr(torch, compute)
    cast = rows * in_features * dtype.itemsize if dtype != recipe.dtype else 0
    scales = 4 if recipe.options["double_quant"] else 0
    unpacked = out_features * in_features * dtype.itemsize + out_features * in_features // 64 * scales + cast
    return Workspace(unpacked, unpacked + (rows * out_features * dtype.itemsize if cast else 0))


def hidden_tensors(module):
    state = module.weight.quant_state
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


def upstream(name, arguments):
    options = _bitsandbytes.upstream(4, name, arguments)
    if options is None:
        return None
    if options.get("quant_storage") == "uint8":
        options["quant_storage"] = "int8"  # the same bytes
    skip = options.pop("skip_modules", ())
    return Upstream(options.pop("scheme", "fp4"), options, skip)


BACKEND = Backend(
    name="bitsandbytes_4bit",
    title="bitsandbytes 4-bit",
    requires=_bitsandbytes.REQUIRES,
    schemes=(
        Scheme("nf4", bits=4, help="Grid of equal shares of a normal distribution; the usual choice for 4 bits."),
        Scheme("fp4", bits=4, help="4-bit floating point; coarser than nf4 for most weights."),
    ),
    options=(
        Option("double_quant", False, "Quantize the scales too: saves another 0.4 bit per weight."),
        Option(
            "compute_dtype",
            "auto",
            "What products are computed in; auto: the dtype of the unquantized layers.",
            choices=("auto", "bfloat16", "float16", "float32"),
        ),
        Option(
            "quant_storage",
            "int8",
            "The dtype that the packed bytes pretend to have; int8 holds what bitsandbytes calls uint8. T5 casts "
            "activations to the floating-point ones, so only int8 and the pipeline's own dtype leave it unchanged.",
            choices=("int8", "bfloat16", "float16", "float32"),
        ),
    ),
    quantize=quantize,
    layer_format=layer_format,
    weight_shape=lambda module: tuple(module.weight.quant_state.shape),
    stored=stored,
    workspace=workspace,
    unfit=lambda recipe, rows, columns: "" if rows * columns % 64 == 0 else "its weights do not fill blocks of 64",
    hidden_tensors=hidden_tensors,
    settle=settle,
    transfer=transfer,
    pack=pack,
    unpack=unpack,
    export=export,
    dequantize=dequantize,
    mark="weight.quant_map",
    reads=reads,
    upstream=upstream,
    dynamo={"capture_dynamic_output_shape_ops": True},
)
