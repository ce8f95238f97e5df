"""A component as its checkpoint has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .accounting import check_surplus
from .architecture import empty_model, is_transformers, kept_in_float32
from .backend import Backend, Packed, Recipe
from .backends import backends, get_backend
from .checkpoint import WeightFiles, weight_files
from .container import read_tensors
from .errors import SourceError, StoreError, one_sentence
from .headers import stored_dtypes, tensors_in
from .layers import layer_recipes
from .packed import fill, packed_layers
from .prequantized import own_reader
from .source import ComponentInfo

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_weights(info: ComponentInfo, dtype: torch.dtype, variant: str | None) -> nn.Module:
    """A component as its checkpoint has it, on the CPU in `dtype`, memory-mapped where the files have that dtype.

    Raises:
        SourceError: the checkpoint lacks weights of the class, which the libraries would fill with random numbers,
            has others that the class does not take, or is quantized in a way that its library ignored.
    """
    if info.parts:
        parts = [(part, weight_files(part, variant)) for part in info.parts]
        return info.cls([read_weights(part, dtype, files.variant) for part, files in parts]).eval()
    cls = info.cls
    if info.prequantized and (model := _read_packed(info, dtype, variant)):
        return model
    arguments: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "variant": variant}
    if is_transformers(cls):
        arguments |= {"dtype": dtype, "ignore_mismatched_sizes": True}  # else it names them in its log only
    else:
        arguments["torch_dtype"] = dtype
    model, found = cls.from_pretrained(info.folder, output_loading_info=True, **arguments)
    if absent := sorted(found["missing_keys"]) or sorted(str(item[0]) for item in found.get("mismatched_keys", ())):
        raise SourceError(
            f"{info.name}: its checkpoint lacks {len(absent)} weights of {cls.__name__}, as {absent[0]}."
        )
    if info.prequantized:
        _check_used(info, model, found["unexpected_keys"])
    check_surplus(
        info, model, {*found["unexpected_keys"], *_untold(info, model, variant)}, lenient=not info.prequantized
    )
    if is_transformers(cls):
        _check_tied(info, model)
    if info.prequantized:
        _settle(model)
        model.to("cpu")  # some libraries quantize on the GPU, and leave it there
    return model.eval().requires_grad_(False)


def _check_used(info: ComponentInfo, model: nn.Module, unexpected: Collection[str]) -> None:
    """A library that ignores how a layer is quantized loads its packed weight as a plain one."""
    plain = {name for name, part in model.named_modules() if type(part) is nn.Linear}
    for key in sorted(unexpected):
        parents = accumulate(key.split("."), "{}.{}".format)
        if layer := next((name for name in parents if name in plain), None):
            raise SourceError(
                f"{info.name}: its checkpoint is quantized with {info.prequantized}, but {layer} was loaded as if it "
                f"were not, without {key}; load the checkpoint that it was made from."
            )


def _untold(info: ComponentInfo, model: nn.Module, variant: str | None) -> set[str]:
    """What diffusers neither reads nor tells: tensors of torchao's files that their metadata does not name."""
    packed = {
        f"{path}.{name}"
        for path, part in model.named_modules()
        for backend in backends().values()
        if backend.pack and backend.layer_format(part)
        for name in backend.pack(part).tensors
    }
    if not packed or is_transformers(model):
        return set()
    return tensors_in(weight_files(info, variant).files).keys() - packed - model.state_dict().keys()


def _check_tied(info: ComponentInfo, model: nn.Module) -> None:
    """transformers says in its log only that weights which should be one are two, and takes them as they are."""
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(one) is not model.get_parameter_or_buffer(other):
            raise SourceError(
                f"{info.name}: {one} and {other} are one weight of {type(model).__name__}, and its checkpoint has two "
                "that differ; leave one of them out of the file."
            )


def _read_packed(info: ComponentInfo, dtype: torch.dtype, variant: str | None) -> nn.Module | None:
    """A prequantized component that a backend here reads, memory-mapped; its library would not, or only on a GPU."""
    found = weight_files(info, variant)
    spec = own_reader(info, found)
    if spec is None:
        return None
    backend, model = get_backend(spec.backend), empty_model(info, dtype)
    tensors = {name: tensor for file in found.files for name, tensor in read_tensors(file)[0].items()}
    layers, rest = packed_layers(tensors, backend.mark)
    recipes = layer_recipes(model, spec, layers, dtype, torch.device("cpu"))
    _check_packed(info, backend, layers, recipes)
    try:
        fill(model, backend, recipes, layers, rest, {})
    except (StoreError, AttributeError) as error:  # a name that the model does not have is an AttributeError
        raise SourceError(
            f"{info.name}: its checkpoint is not what its config says: {one_sentence(error)}."
        ) from error
    return _settle(cast(model, dtype))


def _check_packed(info: ComponentInfo, backend: Backend, layers: Mapping[str, Packed], recipes: Mapping[str, Recipe]):
    """A backend reads the tensors that it knows of a layer, and leaves others."""
    known: dict[str, Collection[str]] = {}
    for path, packed in layers.items():
        recipe = recipes[path]
        if recipe.scheme not in known:  # what it would make of a small layer
            small = backend.quantize(nn.Linear(64, 64, bias=False, dtype=recipe.dtype), recipe)
            known[recipe.scheme] = backend.pack(small).tensors.keys()
        if more := sorted(packed.tensors.keys() - known[recipe.scheme]):
            raise SourceError(
                f"{info.name}: its checkpoint has {path}.{more[0]}, which a layer of {backend.name}/{recipe.scheme} "
                "does not take; load the checkpoint that it was made from."
            )


def _settle(model: nn.Module) -> nn.Module:
    for backend in backends().values():
        if backend.settle:
            backend.settle(model)
    return model


def read_mapped(info: ComponentInfo, dtype: torch.dtype, files: WeightFiles) -> nn.Module:
    """A component whose weights are memory-mapped in the dtype of their files; `cast` completes it.

    What a library can only convert as a whole is in `dtype`, and in memory.

    Raises:
        SourceError: as `read_weights` says.
    """
    if info.parts:
        parts = [(part, weight_files(part, files.variant)) for part in info.parts]
        return info.cls([read_mapped(part, dtype, own) for part, own in parts]).eval()
    floats = {_FLOATS.get(name) for name in stored_dtypes(files.files) if name.startswith(("F", "BF"))}
    stored = next(iter(floats)) if len(floats) == 1 else None
    if stored is None or stored == dtype:
        return read_weights(info, dtype, files.variant)
    model = read_weights(info, stored, files.variant)
    if is_transformers(model):  # which computes some buffers in its own way
        computed = (
            buffer
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name in module._non_persistent_buffers_set
        )
        return read_weights(info, dtype, files.variant) if any(map(torch.is_floating_point, computed)) else model
    made = empty_model(info, dtype)
    for name, module in made.named_modules():
        read = model.get_submodule(name)
        module._parameters = read._parameters
        saved = read._buffers.keys() - read._non_persistent_buffers_set
        module._buffers |= {buffer: read._buffers[buffer] for buffer in saved}
    return made


def cast(model: nn.Module, dtype: torch.dtype, but: Collection[str] = ()) -> nn.Module:
    """Convert a component from `read_mapped` as its library would have, in place, but for what is quantized and the
    weights of the layers `but`."""
    kept = kept_in_float32(model, dtype)
    for prefix, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if name == "weight" and prefix in but:
                continue
            computed = name in module._non_persistent_buffers_set  # in a dtype of its own
            if type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.is_floating_point() or computed:
                continue
            wanted = torch.float32 if not kept.isdisjoint(f"{prefix}.{name}".split(".")) else dtype
            if tensor.dtype != wanted:
                tensor.data = tensor.data.to(wanted)
    return model
