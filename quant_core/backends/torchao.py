"""PyTorch's own quantization: tensor subclasses in place of weights, built from torchao's config objects."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from ..architecture import is_transformers
from ..backend import Backend, Export, Packed, Workspace
from ._inputs import keep_contiguous
from ._slices import by_rows, is_large
from ._torchao_schemes import COMPILING, OPTIONS, SCHEMES, group_size, make_config, upstream


def quantize(linear, recipe):
    from torch import nn

    weight = linear.weight.data
    if recipe.scheme in _BY_ROWS and is_large(weight):
        linear.weight = nn.Parameter(_by_rows(weight, recipe), requires_grad=False)
        return linear
    return _quantized(linear, recipe)


def _quantized(linear, recipe):
    from torch import nn
    from torchao.quantization import quantize_

    holder = nn.Sequential(linear)  # torchao replaces what a parent holds
    config = make_config(recipe.scheme, recipe.options)
    if hasattr(config, "set_inductor_config"):  # for the whole process; see COMPILING
        config = replace(config, set_inductor_config=False)
    quantize_(holder, config)
    settle(holder)
    return holder[0]


def _by_rows(weight, recipe):
    from torch import nn

    def quantized(rows):
        linear = nn.Linear(rows.shape[1], len(rows), False, device="meta")
        linear.weight = nn.Parameter(rows, requires_grad=False)
        return _quantized(linear, recipe).weight.data

    def flat(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]

    one = quantized(weight[:1])
    names, about = one.__tensor_flatten__()
    tensors = by_rows(weight, lambda rows: flat(quantized(rows)))
    return type(one).__tensor_unflatten__(dict(zip(names, tensors, strict=True)), about, None, None)


def pack(layer):
    """As torchao writes it: `_weight_qdata`, `_weight_scale` and so on, with the class and its settings beside."""
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    # Not by torchao's flatten_tensor_state_dict, which copies every tensor.
    weight = layer.weight.data
    about = json.loads(json.dumps(weight, cls=TensorSubclassAttributeJSONEncoder))
    tensors = {f"_weight_{name}": getattr(weight, name) for name in about["_tensor_data_names"]}
    return Packed({name: tensor for name, tensor in tensors.items() if tensor is not None}, about)


def unpack(linear, packed, recipe):
    from torch import nn
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    about = {"layer.weight": json.dumps(packed.about), "tensor_names": json.dumps(["layer.weight"])}
    tensors = {f"layer.{name}": tensor for name, tensor in packed.tensors.items()}
    made, _ = unflatten_tensor_state_dict(tensors, about)
    linear.weight = nn.Parameter(made["layer.weight"], requires_grad=False)
    settle(linear)
    return linear


def export(model, layers, left_out):
    recipes = {recipe.scheme: recipe for recipe in layers.values()}
    configs = {scheme: make_config(scheme, recipe.options) for scheme, recipe in recipes.items()}
    quant_type = _each_its_own(configs, layers) if len(configs) > 1 else next(iter(configs.values()))
    if is_transformers(model):
        from transformers import TorchAoConfig

        skipped = [f"^{re.escape(name)}" for name in left_out]
    else:
        from diffusers import TorchAoConfig

        skipped = sorted(left_out)
    return Export(TorchAoConfig(quant_type, modules_to_not_convert=skipped).to_dict())


def _each_its_own(configs, layers):
    """torchao's config of several, by the names of the weights: a module's would mean its bias to transformers."""
    from torchao.quantization import FqnToConfig

    names = {scheme: [re.escape(name) for name in layers if layers[name].scheme == scheme] for scheme in configs}
    return FqnToConfig({rf"re:({'|'.join(names[scheme])})\.weight": config for scheme, config in configs.items()})


def metadata(layers, others):
    """As torchao's flatten_tensor_state_dict gives it: what each weight is made of, and the names of all tensors."""
    about = {f"{path}.weight": json.dumps(told) for path, told in layers.items()}
    about |= {name: json.dumps({"_type": "Tensor"}) for name in others}
    return {**about, "tensor_names": json.dumps(list(about))}


def settle(model):
    """Take back torchao's `extra_repr`, a method that each layer holds of itself: a cycle, so that only the garbage
    collector would free the layer. Make inputs contiguous for the formats that need it."""
    for module in model.modules():
        vars(module).pop("extra_repr", None)
        if layer_format(module) in _CONTIGUOUS:
            keep_contiguous(module)


_BY_ROWS = ("int8wo", "int8dq", "fp8wo")  # the others have a scale for all rows or a layout across them
# Block formats lack the operator by which PyTorch multiplies a tensor of three dimensions with gaps; kernels of int4
# refuse one, or take its memory for rows.
_CONTIGUOUS = ("NVFP4Tensor", "MXTensor", "Int4TilePackedTo4dTensor", "Int4Tensor")
_TILE = 1024  # in_features are filled up to its multiples by int4wo's packing in tiles
_MULTIPLES = {"fp8dq": 16, "fp8dq_row": 16, "nvfp4wo": 16, "nvfp4dq": 16, "mxfp8dq": 32, "fp8dq_int4wo": 128}


def unfit(recipe, out_features, in_features):
    group = group_size(recipe.scheme, recipe.options)
    if group and in_features % group:
        return f"in_features {in_features} is not a multiple of group_size {group}"
    multiple = _MULTIPLES.get(recipe.scheme, 1)
    if in_features % multiple:
        return f"in_features {in_features} is not a multiple of {multiple}"
    return f"out_features {out_features} is not a multiple of 16" if multiple > 1 and out_features % 16 else ""


def layer_format(module):
    weight = getattr(module, "weight", None)
    if not type(weight).__module__.startswith("torchao.") or not hasattr(weight, "__tensor_flatten__"):
        return None
    return type(weight).__name__


def stored(recipe, out_features, in_features):
    """Packed weights and their scales: float32 per row with a zero point (int8) or without (fp8), per group bfloat16
    with a zero point (int4, in tiles that are filled up), a byte per block, in tiles of 128 rows and 4 blocks, with
    one float32 for all (nvfp4). Measured where it runs on a CPU, else read from torchao's tensor classes."""
    weights = out_features * in_features
    match recipe.scheme:
        case "int8wo" | "int8dq":
            group = group_size(recipe.scheme, recipe.options) or in_features
            return weights + 5 * (weights // group)
        case "fp8wo" | "fp8dq_row":
            return weights + 4 * out_features
        case "fp8dq":
            return weights + 4
        case "int4wo" | "fp8dq_int4wo":
            if _in_tiles(recipe):
                weights = _up(out_features, 8) * _up(in_features, _TILE)
            group = group_size(recipe.scheme, recipe.options) or 128
            return weights // 2 + 4 * (weights // group)
        case "nvfp4wo" | "nvfp4dq":
            return weights // 2 + _tiled(out_features, in_features // 16) + 4
        case "mxfp8dq":
            return weights + _tiled(out_features, in_features // 32)


def _tiled(rows, blocks):
    return _up(rows, 128) * _up(blocks, 4)


def _in_tiles(recipe):
    return recipe.scheme == "int4wo" and recipe.options.get("packing") != "plain"


def _up(number, multiple):
    return -(-number // multiple) * multiple


def workspace(recipe, rows, out_features, in_features):
    """Weight-only schemes unpack the weight, in float32 on the way; the others quantize the input. Measured on the
    CPU, where the scheme or at least its quantization of the input runs there; int4wo has a kernel of its own, for
    inputs that are filled up to its tiles."""
    weights, inputs, size = out_features * in_features, rows * in_features, recipe.dtype.itemsize
    output = rows * out_features * size
    match recipe.scheme:
        case "int8wo" if not group_size("int8wo", recipe.options):
            return Workspace(weights * size, max(weights * size, output))
        case "int8dq":
            return Workspace(8 * inputs + 9 * rows, rows * (12 * out_features + 5) + inputs - output)
        case "fp8wo" | "int8wo":
            return Workspace(weights * (8 + size % 4), weights * size)
        case "nvfp4wo":
            return Workspace(weights * 30, weights * size)
        case "int4wo":
            copied = rows * _up(in_features, _TILE) * 2 if _in_tiles(recipe) else 0
            return Workspace(copied, copied)
        case "fp8dq" | "fp8dq_row" | "fp8dq_int4wo":
            return Workspace(13 * inputs, inputs)
        case "nvfp4dq":
            return Workspace(30 * inputs, inputs)
        case "mxfp8dq":
            return Workspace(13 * inputs, 2 * inputs)


BACKEND = Backend(
    name="torchao",
    title="torchao",
    requires=("torchao>=0.18",),
    schemes=SCHEMES,
    options=OPTIONS,
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
    metadata=metadata,
    upstream=upstream,
    inductor=COMPILING,
    group_stream="what diffusers streams of it fails or comes out wrong (diffusers' issues 13281 and 14433)",
    mixes=True,
    tells_dtype=True,
)
