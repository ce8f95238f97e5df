"""What a quantization backend is: plain data, and functions over one linear layer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import SpecError, choices, did_you_mean
from .user_text import parse_number

if TYPE_CHECKING:
    import torch
    from torch import nn

Value = bool | int | float | str


@dataclass(frozen=True)
class Option:
    """A setting of a backend. A user interface turns it into a widget."""

    name: str
    default: Value
    help: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    schemes: tuple[str, ...] = ()  # the schemes that read it; none named: all
    suffix: str = ""  # the value is a path of a file with this suffix
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # pip requirements of some of the choices

    def read_by(self, scheme: str) -> bool:
        """Whether a scheme reads the option."""
        return not self.schemes or scheme in self.schemes

    def parse(self, text: str) -> Value:
        """The value that a text says, in the option's type.

        Raises:
            ValueError: it says none, in words that follow the text.
        """
        kind = type(self.default)
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError("write true or false")
            return text.lower() == "true"
        try:
            return text if kind is str else parse_number(text, kind)
        except ValueError:
            raise ValueError(f"it takes a {'whole ' * (kind is int)}number") from None

    def check(self, value: Value) -> Value:
        """The value in the option's type.

        Raises:
            SpecError: it is of another type, not among the choices, or out of range.
        """
        if isinstance(self.default, float) and type(value) is int:
            value = float(value) if abs(value) <= sys.float_info.max else math.inf
        if self.choices and type(value) is int:
            value = str(value)
        if type(value) is not type(self.default):
            raise SpecError(f"{self.name} is {value!r}; it takes a {type(self.default).__name__}.")
        if self.choices and value not in self.choices:
            raise SpecError(f"{self.name} is {value!r}; use one of: {', '.join(self.choices)}.")
        least, most = self.minimum, self.maximum
        if not ((least is None or value >= least) and (most is None or value <= most)):  # as NaN is neither
            allowed = f"within {least} and {most}" if most is not None else f"at least {least}"
            raise SpecError(f"{self.name} is {value}; it must be {allowed}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise SpecError(f"{self.name} is {value}; it takes a finite number.")
        return value


@dataclass(frozen=True)
class Scheme:
    """A named recipe within a backend."""

    name: str
    bits: float  # stored per weight, without scales
    help: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")  # device types it is known to run on
    capability: tuple[int, int] | None = None  # the least CUDA compute capability
    requires: tuple[str, ...] = ()  # pip requirements beyond the backend's own
    avoid: str = ""  # why no automatic plan takes it
    uncompilable: str = ""  # why torch.compile does not work on its layers
    slow_eager: str = ""  # why it is of no use on a GPU unless compiled
    inductor: Mapping[str, Any] = field(default_factory=dict)  # settings of torch._inductor that compiling it needs
    immovable: str = ""  # why PyTorch's `to` cannot move its layers


class Upstream(NamedTuple):
    """What the arguments of a diffusers or transformers quantization config mean in our words."""

    scheme: str
    options: dict[str, Value]
    skip_modules: tuple[str, ...]


class Recipe(NamedTuple):
    """All that a backend needs to know to quantize a layer."""

    scheme: str
    options: Mapping[str, Value]
    dtype: torch.dtype  # of activations and of all that stays unquantized
    device: torch.device  # where the layer is quantized


class Workspace(NamedTuple):
    """The most bytes that a layer takes beside its weight, its input and its output while it runs."""

    unpacking: int  # before there is an output
    multiplying: int  # beside the output


class Packed(NamedTuple):
    """A quantized weight as plain tensors under the names that its library gives them in a checkpoint."""

    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]  # what else is needed to make it whole again, as JSON has it


class Export(NamedTuple):
    """How a component is saved so that its library opens it."""

    config: dict[str, Any]  # the quantization_config of its config.json, as JSON has it
    plain: tuple[str, ...] = ()  # layers that its library keeps in 16 bit, so they are saved dequantized
    obstacle: str = ""  # why its library cannot open it in spite of that
    note: str = ""  # what its library wants to open it


class Call(NamedTuple):
    """A config object as it was written: its class and its arguments."""

    name: str
    arguments: Mapping[str, Any]

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({said})" if said else self.name


def upstream_options(name: str, arguments: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of an upstream config under our names, those that are None left out.

    Raises:
        SpecError: an argument is not in `known`, or two of them say the same.
    """
    options: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for argument, value in arguments.items():
        if not isinstance(argument, str) or argument not in known:
            hint = did_you_mean(str(argument), known)
            raise SpecError(f"{name} takes no {argument}{hint}; it takes: {choices(known)}.")
        if value is None:
            continue
        if before := said_by.get(known[argument]):
            raise SpecError(f"{name} has both {before} and {argument}, which say the same; keep one of them.")
        said_by[known[argument]] = argument
        if known[argument] == "skip_modules":
            names = [value] if isinstance(value, str) else value
            if not isinstance(names, (list, tuple)) or not all(isinstance(module, str) for module in names):
                raise SpecError(f"{argument} is {value!r}; it takes a list of module names.")
            value = tuple(f"**.{module}" for module in names)  # upstream means a module of that name anywhere
        options[known[argument]] = value
    return options


def _nothing(module: nn.Module) -> Iterable[torch.Tensor]:
    return ()


def _always(recipe: Recipe, out_features: int, in_features: int) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """One quantization library."""

    name: str  # as in diffusers' documentation
    title: str
    requires: tuple[str, ...]  # pip requirements
    schemes: tuple[Scheme, ...]
    quantize: Callable[[nn.Linear, Recipe], nn.Module]  # the layer, on recipe.device in recipe.dtype, quantized
    layer_format: Callable[[nn.Module], str | None]  # how a module's weight is stored, None if not by this backend
    weight_shape: Callable[[nn.Module], tuple[int, ...]]  # of a layer of ours, before it was packed
    stored: Callable[[Recipe, int, int], int]  # bytes of a weight of (out, in) features, scales and tables included
    workspace: Callable[[Recipe, int, int, int], Workspace]  # of a layer of (out, in) features, after rows of input
    upstream: Callable[[str, Mapping[str, Any]], Upstream | None]  # config class or backend name, its arguments
    options: tuple[Option, ...] = ()
    unfit: Callable[[Recipe, int, int], str] = _always  # why a layer of (out, in) features cannot be quantized
    hidden_tensors: Callable[[nn.Module], Iterable[torch.Tensor]] = _nothing  # stored outside parameters and buffers
    pack: Callable[[nn.Module], Packed] | None = None  # a layer of ours, but for its bias, as it is stored
    unpack: Callable[[nn.Linear, Packed, Recipe], nn.Module] | None = None  # the layer again, in place of one on meta
    export: Callable[[nn.Module, Mapping[str, Recipe], Collection[str]], Export] | None = None  # layers, left out
    metadata: Callable[..., dict[str, str]] | None = None  # of safetensors files: layer -> about, other tensors' names
    dequantize: Callable[[nn.Module], torch.Tensor] | None = None  # the weight of a layer, for those saved plainly
    mark: str = ""  # a tensor that every packed layer has, by which `reads` is followed
    reads: Callable[[Mapping[str, Any]], tuple[str, dict[str, Value]] | None] | None = None  # see reading.py
    check: Callable[..., None] | None = None  # looks into a file that a spec names, before any weight is read
    load: Callable[..., nn.Module] | None = None  # a component from a file of the backend's own format
    save: Callable[..., None] | None = None  # a component into such a file
    settle: Callable[[nn.Module], None] | None = None  # what a component that its checkpoint quantized needs to run
    transfer: Callable[..., dict[str, Any]] | None = None  # attributes of a layer with its weight copied; see transfer
    mixes: bool = False  # layers of one component may have several of its schemes
    tells_dtype: bool = False  # its packed weights say the dtype and the shape that they stand for
    dynamo: Mapping[str, Any] = field(default_factory=dict)  # settings of torch._dynamo that its layers need
    inductor: Mapping[str, Any] = field(default_factory=dict)  # settings of torch._inductor that its layers need
    group_offload: str = ""  # why diffusers' group offload cannot move its layers
    group_stream: str = ""  # why it cannot stream them
    notice: str = ""  # what a user should know before choosing it

    def scheme(self, name: str) -> Scheme:
        """The scheme of that name.

        Raises:
            SpecError: there is none.
        """
        for scheme in self.schemes:
            if scheme.name == name:
                return scheme
        known = [scheme.name for scheme in self.schemes]
        raise SpecError(f"{self.name} has no scheme {name!r}; use one of: {choices(known)}.")

    def complete(self, scheme: str, options: Mapping[str, Value], mixed: Collection[str] = ()) -> dict[str, Value]:
        """The options that the scheme or one `mixed` with it reads: those given, checked, and the defaults of the
        others.

        Raises:
            SpecError: an option is unknown, has no effect on the schemes, or its value is wrong.
        """
        schemes = dict.fromkeys((scheme, *mixed))
        known = {option.name: option for option in self.options}
        for name in options.keys() - known.keys():
            raise SpecError(
                f"{self.name} has no option {name!r}{did_you_mean(name, known)}; it takes: {choices(known)}."
            )
        result = {}
        for name, option in known.items():
            value = option.check(options.get(name, option.default))
            if any(map(option.read_by, schemes)):
                result[name] = value
            elif name in options:
                what = f"{self.name}/{'+'.join(schemes)}"
                raise SpecError(f"{name} has no effect on {what}; it belongs to: {choices(option.schemes)}.")
        return result
