"""GGUF: ggml's block formats, read from a .gguf file or made with the gguf package, in diffusers' GGUF layers."""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path

from ..architecture import is_transformers, kept_in_float32
from ..backend import Backend, Option, Scheme, Workspace, upstream_options
from ..errors import SourceError, SpecError
from . import _gguf_file, _gguf_names, _gguf_reading

FILE = "file"
_BLOCK_BYTES = {"Q8_0": 34, "Q5_1": 24, "Q5_0": 22, "Q4_1": 20, "Q4_0": 18}  # of 32 weights


@cache
def _layer_class():
    from diffusers.quantizers.gguf.utils import GGUFLinear

    class Linear(GGUFLinear):
        """diffusers' layer, called as PyTorch's is: the name of its input too."""

        def forward(self, input):
            return super().forward(input)

    return Linear


def _layer(linear, packed, qtype, dtype):
    import torch
    from diffusers.quantizers.gguf.utils import GGUFParameter

    layer = _layer_class()(linear.in_features, linear.out_features, False, dtype, device="meta")
    # Signed bytes, because T5 casts its activations to a uint8 weight's dtype. The layer reads both alike.
    layer.weight = GGUFParameter(packed.view(torch.int8), quant_type=qtype)
    layer.bias = linear.bias
    return layer


def quantize(linear, recipe):
    import gguf
    import torch

    scheme = "Q8_0" if recipe.scheme == FILE else recipe.scheme  # a file can hold any type: try the commonest
    packed = torch.from_numpy(_gguf_file.pack(linear.weight.data, scheme))
    return _layer(linear, packed, getattr(gguf.GGMLQuantizationType, scheme), recipe.dtype).to(recipe.device)


def check(info, spec, model, layers):
    """Look into the file that a spec names, before any weight of the pipeline is read."""
    if spec.scheme != FILE:
        return
    path, own = Path(spec.options["path"]), _gguf_names.weights(model)
    found = _gguf_names.named_values(info, model, _gguf_reading.read(path), "meta")
    tied = set(getattr(model, "_tied_weights_keys", None) or ())  # filled from the weights they share
    for name, value in found.items():
        _check_shape(value, name, own[name], type(model), path)
    there = {id(own[name]) for name in found}
    if lacking := sorted(name for name, weight in own.items() if id(weight) not in there and name not in tied):
        raise SourceError(f"{path.name} lacks {len(lacking)} weights of {type(model).__name__}, as {lacking[0]}.")
    if not any(_gguf_reading.is_packed(found.get(f"{layer}.weight")) for layer in layers):
        raise SourceError(f"{path.name} holds no quantized layer of {type(model).__name__}; leave it out of the plan.")


def save(folder, model, dtype, layers, tell):
    """Write a component, in its final dtypes but for the weights of its layers, as a file `weights.gguf`.

    Layers that are packed already are written as they are.
    """
    tensors = _tensors(model, {name: recipe.scheme for name, recipe in layers.items()})
    _gguf_file.write(folder / "weights.gguf", type(model).__name__, tensors, dtype, tell)


def _tensors(model, schemes):
    """(name, tensor, ggml type) of all that the component's checkpoint holds, shared ones once.

    What is neither packed nor a matrix is float32, not bfloat16, which diffusers could not use for it.
    """
    from torch import nn

    kinds = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}
    seen, found = set(), []
    for name, tensor in _gguf_names.weights(model).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            module, _, kind = name.rpartition(".")
            if kind == "weight" and layer_format(model.get_submodule(module)):
                found.append((name, tensor.as_tensor(), tensor.quant_type.name))
            elif kind == "weight" and module in schemes:
                found.append((name, tensor, schemes[module]))
            else:
                matrix = kind == "weight" and isinstance(model.get_submodule(module), (nn.Linear, nn.Embedding))
                fits = str(tensor.dtype) in kinds and (matrix or str(tensor.dtype) != "torch.bfloat16")
                plain = tensor if fits else tensor.float()
                found.append((name, plain, kinds[str(plain.dtype)]))
    return found


def load(info, model, dtype, layers, path, tell):
    """The component, which is without weights, from a file, memory-mapped."""
    found = _gguf_names.named_values(info, model, _gguf_reading.read(path))
    done, total = 0, sum(value.nbytes for value in found.values())
    for name in list(found):
        value = found.pop(name)
        done += value.nbytes
        _assign(model, name, value, dtype, layers, path)
        tell(done, total)
    if is_transformers(model):
        model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise SourceError(f"{path.name} lacks {len(empty)} weights of {type(model).__name__}, as {empty[0]}.")
    return model.eval().requires_grad_(False).to("cpu")


def _check_shape(value, name, weight, cls, path):
    """A tensor may have been flattened, or have lost its dimensions of one."""
    shape, wanted = _gguf_reading.shape_of(value), tuple(weight.shape)
    alike = [size for size in shape if size != 1] == [size for size in wanted if size != 1]
    if not alike and shape != _gguf_file.stored_shape(weight):
        raise SourceError(f"{path.name} stores {name} as {shape}; {cls.__name__} takes {wanted}.")


def _assign(model, name, value, dtype, layers, path):
    import torch

    module_name, _, kind = name.rpartition(".")
    module = model.get_submodule(module_name)
    old = getattr(module, kind)
    _check_shape(value, name, old, type(model), path)
    if module_name in layers and kind == "weight" and _gguf_reading.is_packed(value):
        model.set_submodule(module_name, _layer(module, value.as_tensor(), value.quant_type, dtype))
        return
    value = _gguf_reading.unpack(value).reshape(old.shape)
    if kind in module._buffers:
        module._buffers[kind] = value.to(old.dtype if not old.is_floating_point() else dtype)
        return
    kept = not kept_in_float32(model, dtype).isdisjoint(name.split("."))
    value = value.to(torch.float32 if kept else dtype)
    setattr(module, kind, torch.nn.Parameter(value, requires_grad=False))


def unfit(recipe, out_features, in_features):
    if recipe.scheme != FILE and in_features % 32:
        return f"in_features {in_features} is not a multiple of 32"
    return ""


def stored(recipe, out_features, in_features):
    """Blocks of 32 weights; of a file what it holds of this shape, or on average where it names layers otherwise."""
    weights = out_features * in_features
    if recipe.scheme != FILE:
        return weights // 32 * _BLOCK_BYTES[recipe.scheme]
    packed = [
        tensor
        for tensor in _gguf_reading.read(Path(recipe.options["path"])).tensors.values()
        if tensor.type.name not in _gguf_reading.PLAIN
    ]
    found = [tensor for tensor in packed if tensor.shape == (out_features, in_features)] or packed
    return round(weights * sum(tensor.data.nbytes for tensor in found) / sum(prod(tensor.shape) for tensor in found))


def workspace(recipe, rows, out_features, in_features):
    """The weight, with what unpacking it takes on the way, as measured on the CPU; the same PyTorch code runs on
    CUDA. A file is taken to hold types of 5 bits, which take most."""
    weights, size = out_features * in_features, recipe.dtype.itemsize
    on_the_way = {"Q8_0": size + 2, "Q4_0": max(size + 2, 5), "Q4_1": max(size + 2, 5)}.get(recipe.scheme, 10)
    return Workspace(weights * on_the_way, weights * size)


def layer_format(module):
    weight = getattr(module, "weight", None)
    if type(weight).__name__ != "GGUFParameter" or not hasattr(module, "in_features"):
        return None
    return weight.quant_type.name if weight.quant_type.name not in _gguf_reading.PLAIN else None


def transfer(layer, copy, device):
    """The packed weight, which is a parameter of its own class."""
    old = layer.weight
    return {"weight": type(old)(copy(old.as_tensor()), quant_type=old.quant_type)}


def upstream(name, arguments):
    if name not in ("gguf", "GGUFQuantizationConfig"):
        return None
    upstream_options(name, arguments, {"compute_dtype": "compute_dtype"})
    raise SpecError(
        "GGUFQuantizationConfig does not say which file to read; write component=gguf/file?path=FILE.gguf, "
        "or component=gguf/Q8_0 to have one made."
    )


def _scheme(name, bits):
    return Scheme(name, bits=bits, help=f"Made from the 16-bit weights once, {bits} bits with its scales.")


BACKEND = Backend(
    name="gguf",
    title="GGUF",
    requires=("gguf>=0.19",),
    schemes=(
        _scheme("Q8_0", 8.5),
        _scheme("Q5_1", 6.0),
        _scheme("Q5_0", 5.5),
        _scheme("Q4_1", 5.0),
        _scheme("Q4_0", 4.5),
        Scheme(FILE, bits=0, help="A ready .gguf file, any type of it that diffusers can decode."),
    ),
    options=(Option("path", "", "The file to read (scheme file).", schemes=(FILE,), suffix=".gguf"),),
    quantize=quantize,
    layer_format=layer_format,
    weight_shape=lambda module: (module.out_features, module.in_features),
    stored=stored,
    workspace=workspace,
    unfit=unfit,
    check=check,
    load=load,
    save=save,
    transfer=transfer,
    upstream=upstream,
    mixes=True,
)
