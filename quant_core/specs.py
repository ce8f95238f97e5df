"""What the user asks for. Checked when made, frozen after."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .backend import Backend, Recipe, Value
from .backends import backends, get_backend
from .errors import SpecError, choices
from .user_text import check_type

if TYPE_CHECKING:
    import torch

RECOMMENDED = "recommended"  # among skip patterns: the list of the component's architecture
NOTHING = "none"  # alone in place of skip patterns


@dataclass(frozen=True)
class QuantSpec:
    """How one component is quantized.

    A skip pattern is the full name of a module within its component (`transformer_blocks.0.attn.to_q`), or a glob
    of it in which `*` also matches dots; `**.` in front means at any depth. It covers all that is inside the module.
    Of a plan's default, a pattern has to match in one of the components at least. The word `recommended` stands for
    the list that skip_lists.json has for the component's class, and that is also what None means where the scheme
    stores fewer than 8 bits per weight; () or the word `none` alone skips nothing.

    `mixed` maps patterns of the same kind to other schemes of the backend, for the layers that they match; the first
    that matches a layer wins. Skip patterns win over it, and it wins over those that are recommended. An option may be
    one that any of the schemes reads.

    Raises:
        SpecError: the backend, the scheme or an option is unknown, has no effect or has a wrong value.
    """

    backend: str
    scheme: str
    options: Mapping[str, Value] = field(default_factory=dict)
    skip_modules: tuple[str, ...] | None = None
    mixed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        backend = get_backend(self.backend)
        backend.scheme(self.scheme)
        if not isinstance(self.options, Mapping):
            raise SpecError(f"options are {self.options!r}; write an object: name to value.")
        mixed = _mixed(backend, self.scheme, self.mixed)
        options = backend.complete(self.scheme, self.options, mixed.values())
        object.__setattr__(self, "options", MappingProxyType(options))
        object.__setattr__(self, "skip_modules", _patterns(self.skip_modules))
        object.__setattr__(self, "mixed", MappingProxyType(mixed))

    def __hash__(self):
        options, mixed = tuple(sorted(self.options.items())), tuple(self.mixed.items())
        return hash((self.backend, self.scheme, options, self.skip_modules, mixed))

    def __str__(self) -> str:
        return f"{self.backend}/{'+'.join(self.schemes)}"

    @property
    def schemes(self) -> tuple[str, ...]:
        """Its own and those that are mixed with it, each once."""
        return tuple(dict.fromkeys((self.scheme, *self.mixed.values())))

    def recipes(self, dtype: torch.dtype, device: torch.device) -> dict[str, Recipe]:
        """Scheme to recipe, with the options that the scheme reads."""
        known = {option.name: option for option in get_backend(self.backend).options}
        made = {}
        for scheme in self.schemes:
            options = {name: value for name, value in self.options.items() if known[name].read_by(scheme)}
            made[scheme] = Recipe(scheme, options, dtype, device)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it."""
        result: dict[str, Any] = {"backend": self.backend, "scheme": self.scheme, "options": dict(self.options)}
        if self.skip_modules is not None:
            result["skip_modules"] = list(self.skip_modules)
        if self.mixed:
            result["mixed"] = dict(self.mixed)
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """The spec that `to_dict` wrote.

        Raises:
            SpecError: it has other keys, lacks one, or describes no valid spec.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"A spec is {data!r}; write an object with backend and scheme.")
        known = ("backend", "scheme", "options", "skip_modules", "mixed")
        if unknown := data.keys() - set(known):
            raise SpecError(f"A spec has no {choices(unknown)}; it has {', '.join(known)}.")
        if not isinstance(data.get("backend"), str) or not isinstance(data.get("scheme"), str):
            raise SpecError("A spec needs both backend and scheme, by name.")
        return cls(**{name: value for name, value in data.items() if value is not None})


def _patterns(skip: Any) -> tuple[str, ...] | None:
    if skip is None:
        return None
    if not isinstance(skip, (str, list, tuple)):
        raise SpecError(f"skip_modules are {skip!r}; write a list of patterns.")
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    if bad := [pattern for pattern in patterns if not isinstance(pattern, str) or not pattern.strip()]:
        raise SpecError(f"{bad[0]!r} is no skip pattern; write a module's name or a glob of it.")
    return () if patterns == (NOTHING,) else patterns


def _mixed(backend: Backend, scheme: str, mixed: Any) -> OrderedDict[str, str]:
    if not isinstance(mixed, Mapping):
        raise SpecError(f"mixed is {mixed!r}; write an object: module pattern to scheme.")
    if mixed and not backend.mixes:
        known = choices(other.name for other in backends().values() if other.mixes)
        raise SpecError(f"{backend.name} takes one scheme per component; these take several: {known}.")
    for pattern, other in mixed.items():
        if not isinstance(pattern, str) or not pattern.strip():
            raise SpecError(f"{pattern!r} is no module pattern; write a module's name or a glob of it.")
        backend.scheme(other)
    for each in (scheme, *mixed.values()) if mixed else ():
        if any(option.suffix and option.read_by(each) for option in backend.options):
            raise SpecError(f"{backend.name}/{each} takes each layer as its file has it; it cannot be mixed.")
    return OrderedDict(mixed)  # which counts the order when it is compared


@dataclass(frozen=True)
class QuantPlan:
    """Which component gets which spec: named ones theirs, denoiser and text encoders otherwise the default."""

    components: Mapping[str, QuantSpec] = field(default_factory=dict)
    default: QuantSpec | None = None

    def __post_init__(self):
        check_type("components", self.components, Mapping)
        for name, spec in [*self.components.items(), *([] if self.default is None else [("default", self.default)])]:
            if not isinstance(spec, QuantSpec):
                raise SpecError(f"{name} is to be quantized as {spec!r}; give it a QuantSpec.")
        for name in self.components:
            if not isinstance(name, str) or not name.isidentifier() or name == "default":
                raise SpecError(f"{name!r} is no name of a component; a plan names one, as transformer.")
        object.__setattr__(self, "components", MappingProxyType(dict(self.components)))

    def __hash__(self):
        return hash((tuple(sorted(self.components.items(), key=lambda item: item[0])), self.default))

    @property
    def mode(self) -> str:
        """`none`, `global` (only a default) or `granular` (components are named)."""
        return "granular" if self.components else "global" if self.default else "none"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it."""
        result: dict[str, Any] = {"components": {name: spec.to_dict() for name, spec in self.components.items()}}
        if self.default:
            result["default"] = self.default.to_dict()
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantPlan:
        """The plan that `to_dict` wrote.

        Raises:
            SpecError: it has other keys or describes no valid plan.
        """
        if not isinstance(data, Mapping) or data.keys() - {"components", "default"}:
            raise SpecError("A plan is an object with components and default, and nothing else.")
        components = {} if data.get("components") is None else data["components"]
        if not isinstance(components, Mapping):
            raise SpecError("A plan's components are an object: component name to spec.")
        default = data.get("default")
        return cls(
            {name: QuantSpec.from_dict(spec) for name, spec in components.items()},
            QuantSpec.from_dict(default) if default is not None else None,
        )
