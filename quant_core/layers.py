"""Which linear layers of a model a spec reaches, and quantizing them one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from .allocator import give_back
from .architecture import kept_in_float32
from .backend import Backend, Recipe
from .backends import get_backend
from .errors import SpecError, did_you_mean
from .specs import QuantSpec
from .transfer import moved
from .weight_reads import weight_reads

SKIPPED = "skipped by the plan"
_OFTEN = 32 * 2**20  # weights after whose quantization freed memory goes back to the operating system


@dataclass(frozen=True)
class LayerPlan:
    """The linear layers of a component: those to quantize and how, and why the others are left out."""

    layers: dict[str, Recipe]
    left_out: dict[str, str] = field(default_factory=dict)


def plan_layers(
    model: nn.Module, spec: QuantSpec, dtype: torch.dtype, device: torch.device, written: Iterable[str]
) -> LayerPlan:
    """Which layers of a model, which may be on the meta device, the spec reaches. Of its skip patterns, those that are
    not `written` by the user are recommended, for layers that no mixed pattern names."""
    unwanted = match_modules(model, written)
    skipped = match_modules(model, spec.skip_modules) - match_modules(model, spec.mixed)
    kept = kept_in_float32(model, dtype)
    tied, reads = _tied(model), weight_reads(model)
    linear = dict(linear_layers(model))
    recipes, backend = layer_recipes(model, spec, linear, dtype, device), get_backend(spec.backend)
    layers, left_out = {}, {}
    for name, layer in linear.items():
        out_features, in_features = layer.weight.shape
        if name in unwanted:
            left_out[name] = SKIPPED
        elif name in skipped:
            left_out[name] = f"recommended to stay in 16 bit for {type(model).__name__}"
        elif any(part in kept for part in name.split(".")):
            left_out[name] = "its model keeps it in float32"
        elif type(layer) is not nn.Linear:
            left_out[name] = f"it is a {type(layer).__name__}, whose weight its parent reads itself"
        elif (read := reads.get(name)) and not (read.asks and backend.tells_dtype):
            left_out[name] = f"{read.reader} reads {'the dtype of ' * read.asks}its weight, which would be packed"
        elif name in tied:
            left_out[name] = "its weight is shared with another module"
        elif reason := backend.unfit(recipes[name], out_features, in_features):
            left_out[name] = reason
        else:
            layers[name] = recipes[name]
    return LayerPlan(layers, left_out)


def layer_recipes(
    model: nn.Module, spec: QuantSpec, layers: Collection[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Recipe]:
    """How each layer of a model is quantized: by the scheme of the first mixed pattern that matches it, else by the
    spec's own."""
    recipes = spec.recipes(dtype, device)
    matched = [(match_modules(model, [pattern]), scheme) for pattern, scheme in spec.mixed.items()]
    own = {name: scheme for names, scheme in reversed(matched) for name in names}
    return {name: recipes[own.get(name, spec.scheme)] for name in layers}


def stored_sizes(model: nn.Module, layers: Mapping[str, Recipe], backend: Backend) -> dict[str, int]:
    """Bytes that the weight of each layer will take as it is stored."""
    sizes, known = {}, {}
    for name, recipe in layers.items():
        shape = tuple(model.get_submodule(name).weight.shape)
        if (recipe.scheme, shape) not in known:
            known[recipe.scheme, shape] = backend.stored(recipe, *shape)
        sizes[name] = known[recipe.scheme, shape]
    return sizes


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that multiply by a matrix, by full name, quantized already or not."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def match_modules(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Full names of the modules that the patterns match, with all that is inside them."""
    names = [name for name, _ in model.named_modules() if name]
    found = {name for name in names if any(_matches(name, pattern) for pattern in patterns)}
    return {name for name in names if not found.isdisjoint(_with_parents(name))}


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _matches(name: str, pattern: str) -> bool:
    anywhere = pattern.removeprefix("**.")
    return fnmatchcase(name, anywhere) or (pattern != anywhere and fnmatchcase(name, f"*.{anywhere}"))


def check_patterns(models: Sequence[nn.Module], patterns: Iterable[str], what: str = "Skip pattern") -> None:
    """Check that each pattern matches a module of at least one of the models.

    Raises:
        SpecError: a pattern matches nothing.
    """
    names = {name for model in models for name, _ in model.named_modules() if name}
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            anywhere = pattern.removeprefix("**.")
            hint = did_you_mean(anywhere, names) or did_you_mean(anywhere, {name.split(".")[-1] for name in names})
            classes = ", ".join(sorted({type(model).__name__ for model in models}))
            raise SpecError(f"{what} {pattern!r} matches no module of {classes}{hint}.")


def _tied(model: nn.Module) -> set[str]:
    """Linear layers whose weight is another module's too: quantizing one would leave two weights."""
    owners = Counter(id(module.weight) for module in model.modules() if isinstance(_weight(module), nn.Parameter))
    tied = {name for name, layer in linear_layers(model) if owners[id(layer.weight)] > 1}
    config = getattr(model, "config", None)  # which a model that is several has not
    declared = getattr(model, "_tied_weights_keys", None) if getattr(config, "tie_word_embeddings", False) else None
    return tied | {key.removesuffix(".weight") for key in declared or ()}


def _weight(module: nn.Module):
    return module._parameters.get("weight")


def quantized_layers(
    model: nn.Module,
    layers: Mapping[str, Recipe],
    backend: Backend,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, nn.Module]]:
    """The named linear layers one by one, quantized; the caller puts something in the place of each.

    `tell` is called after each with the weights quantized so far and those of all; it may raise to stop.
    """
    done, returned, total = 0, 0, sum(model.get_submodule(name).weight.numel() for name in layers)
    for name, recipe in layers.items():
        layer = model.get_submodule(name)
        home, size = layer.weight.device, layer.weight.numel()
        quantized = backend.quantize(layer.to(recipe.device, recipe.dtype), recipe)
        yield name, moved(quantized.requires_grad_(False).eval(), home)
        del layer, quantized
        done += size
        if done - returned >= _OFTEN:
            give_back()
            returned = done
        tell(done, total)
