"""GGUF: ggml's block formats, read from a .gguf file or made with the gguf package, in diffusers' GGUF layers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..architecture import is_transformers, kept_in_float32
from ..backend import Backend, Option, Scheme, Workspace, upstream_options
from ..errors import SourceError, SpecError, choices
from . import _gguf_file

FILE = "file"
_PLAIN = ("F32", "F16", "BF16")  # types that quantize nothing
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
    layer.weight = GGUFParameter(torch.from_numpy(packed).view(torch.int8), quant_type=qtype)
    layer.bias = linear.bias
    return layer


def quantize(linear, recipe):
    import gguf

    scheme = "Q8_0" if recipe.scheme == FILE else recipe.scheme  # a file can hold any type: try the commonest
    packed = _gguf_file.pack(linear.weight.data, scheme)
    return _layer(linear, packed, getattr(gguf.GGMLQuantizationType, scheme), recipe.dtype).to(recipe.device)


def check(info, spec, model, layers):
    """Look into the file that a spec names, before any weight of the pipeline is read."""
    if spec.scheme != FILE:
        return
    path = Path(spec.options["path"])
    reader = _gguf_file.read(path)
    names = _gguf_file.tensor_names(reader, model)
    if names is None:
        _ensure_converted(path, type(model))
        return
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = _gguf_file.weights(model)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())  # filled from the weights they share
    for name, tensor in names.items():
        _check_tensor(tensors[tensor], name, weights[name], type(model), path)
    there = {id(weights[name]) for name in names}
    if lacking := sorted(name for name, weight in weights.items() if id(weight) not in there and name not in tied):
        raise SourceError(f"{path.name} lacks {len(lacking)} weights of {type(model).__name__}, as {lacking[0]}.")
    kinds = {tensors[names[f"{layer}.weight"]].tensor_type.name for layer in layers if f"{layer}.weight" in names}
    if not kinds - set(_PLAIN):
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
    for name, tensor in _gguf_file.weights(model).items():
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
    reader = _gguf_file.read(path)
    names = _gguf_file.tensor_names(reader, model)
    if names is None:
        return _complete(_read_converted(path, info, type(model), dtype, layers), path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    done, total = 0, sum(tensors[tensor].n_bytes for tensor in names.values())
    for name, tensor in names.items():
        _assign(model, name, tensors[tensor], dtype, layers, path)
        done += tensors[tensor].n_bytes
        tell(done, total)
    if is_transformers(model):
        model.tie_weights()
    return _complete(model, path)


def _complete(model, path):
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise SourceError(f"{path.name} lacks {len(empty)} weights of {type(model).__name__}, as {empty[0]}.")
    return model.eval().requires_grad_(False).to("cpu")


def _check_tensor(tensor, name, weight, cls, path):
    """Whether a tensor of the file can be what the model's class has under that name."""
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    plain = tensor.tensor_type.name in _PLAIN
    if not plain and tensor.tensor_type not in SUPPORTED_GGUF_QUANT_TYPES:
        known = choices(item.name for item in SUPPORTED_GGUF_QUANT_TYPES)
        raise SourceError(
            f"{path.name} stores {name} as {tensor.tensor_type.name}; the types that can be read: {known}."
        )
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if shape not in (tuple(weight.shape), _gguf_file.stored_shape(weight)):
        raise SourceError(f"{path.name} stores {name} as {shape}; {cls.__name__} takes {tuple(weight.shape)}.")
    return plain


def _assign(model, name, tensor, dtype, layers, path):
    import torch

    module_name, _, kind = name.rpartition(".")
    module = model.get_submodule(module_name)
    old = getattr(module, kind)
    plain = _check_tensor(tensor, name, old, type(model), path)
    if module_name in layers and kind == "weight" and not plain:
        model.set_submodule(module_name, _layer(module, tensor.data, tensor.tensor_type, dtype))
        return
    value = _unpack(tensor.data, tensor.tensor_type, plain).reshape(old.shape)
    if kind in module._buffers:
        module._buffers[kind] = value.to(old.dtype if not old.is_floating_point() else dtype)
        return
    kept = not kept_in_float32(model, dtype).isdisjoint(name.split("."))
    value = value.to(torch.float32 if kept else dtype)
    setattr(module, kind, torch.nn.Parameter(value, requires_grad=False))


def _unpack(data, qtype, plain):
    import torch
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    value = torch.from_numpy(data)
    if qtype.name == "BF16":
        return value.view(torch.bfloat16)
    return value if plain else dequantize_gguf_tensor(GGUFParameter(value, quant_type=qtype))


def _read_converted(path, info, cls, dtype, layers):
    """A file in the names of the model's first release, which diffusers converts for the classes it knows."""
    import torch
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    _ensure_converted(path, cls)
    model = cls.from_single_file(
        str(path),
        config=str(info.folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        local_files_only=True,
    )
    for name, module in list(model.named_modules()):
        packed = [kind for kind, weight in module._parameters.items() if type(weight).__name__ == "GGUFParameter"]
        if layer_format(module) and name in layers:
            module.__class__ = _layer_class()
            continue
        for kind in packed:  # left out, or what is no linear layer's, or 16 bit under GGUF's name
            weight = dequantize_gguf_tensor(getattr(module, kind)).to(dtype)
            setattr(module, kind, torch.nn.Parameter(weight, requires_grad=False))
        if packed and isinstance(module, torch.nn.Linear):
            linear = torch.nn.Linear(module.in_features, module.out_features, False, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


def _ensure_converted(path, cls):
    if not hasattr(cls, "from_single_file"):
        raise SourceError(
            f"{path.name} is not written in the names of {cls.__name__}, and diffusers converts no other for it; "
            "make one with gguf/Q8_0 instead."
        )


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
        (tensor, int(tensor.n_elements), int(tensor.n_bytes))
        for tensor in _gguf_file.read(Path(recipe.options["path"])).tensors
        if tensor.tensor_type.name not in _PLAIN
    ]
    alike = [item for item in packed if [int(size) for size in item[0].shape] == [in_features, out_features]]
    found = alike or packed
    return round(weights * sum(size for _, _, size in found) / sum(count for _, count, _ in found))


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
    return weight.quant_type.name if weight.quant_type.name not in _PLAIN else None


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
