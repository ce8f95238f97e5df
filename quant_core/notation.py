"""Plans as text: our short form, our JSON, and what stands in diffusers' documentation."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any
from urllib.parse import quote, unquote

from .backend import Call, Option, Value
from .backends import backends, get_backend
from .errors import SpecError, choices
from .specs import NOTHING, QuantPlan, QuantSpec
from .user_text import BYTE_ORDER_MARK, check_whole, once, parse_json

_PREFIXES = ("Diffusers", "Transformers")  # under which documentation imports the two libraries' config classes
_CALL = re.compile(r"(\w+\s*=\s*)?[\w.]+\s*\(|import\b|from\b")  # Python text: a call, also one that is assigned
_PLAN = "The plan"  # in errors
_UNREADABLE = "The plan is no Python that can be read; write one PipelineQuantizationConfig(...)."
_DIFFUSERS_KEYS = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")


def parse_plan(text: str) -> QuantPlan:
    """A plan from any of its written forms.

    - `torchao/int8wo`: the default, for denoiser and text encoders
    - `transformer=torchao/int8wo,text_encoder_2=bitsandbytes_4bit/nf4?double_quant=true&skip=**.proj_out`
      (`default=` names the default among components; several skip patterns are joined by `|`, and `skip=none` skips
      nothing; a comma, `&`, `=` or `|` inside a value is written %2C, %26, %3D, %7C)
    - `transformer=gguf/Q4_0?Q8_0=**.attn|proj_out&Q5_0=**.ff`: other schemes for the layers that patterns match
    - the JSON of `QuantPlan.to_dict`
    - a `PipelineQuantizationConfig` of diffusers: its call as Python text, or its arguments as JSON

    Raises:
        SpecError: it is none of these, or describes no valid plan.
    """
    text = text.removeprefix(BYTE_ORDER_MARK).strip()
    if not text or text == "none":
        return QuantPlan()
    if text.startswith("{"):
        data = parse_json(_PLAN, text)
        return plan_from_diffusers(data) if data.keys() & set(_DIFFUSERS_KEYS) else QuantPlan.from_dict(data)
    if _CALL.match(text):
        return _parse_python(text)
    return _parse_short(text)


def parse_spec(text: str) -> QuantSpec:
    """A spec from its short form, as `gguf/Q4_0`.

    Raises:
        SpecError: it is none.
    """
    plan = parse_plan(text)
    if plan.components or not plan.default:
        raise SpecError(f"{text!r} is no scheme; write one as gguf/Q4_0.")
    return plan.default


def format_plan(plan: QuantPlan) -> str:
    """The short form of a plan; `parse_plan` reads it back."""
    parts = [f"{name}={_format_spec(spec)}" for name, spec in plan.components.items()]
    if plan.default:
        parts.append(f"default={_format_spec(plan.default)}" if parts else _format_spec(plan.default))
    return ",".join(parts) or "none"


def _format_spec(spec: QuantSpec) -> str:
    defaults = get_backend(spec.backend).complete(spec.scheme, {}, spec.mixed.values())
    given = [(name, value) for name, value in spec.options.items() if value != defaults[name]]
    query = [f"{name}={quote(_format_value(value), safe='/:.')}" for name, value in given]
    for scheme, patterns in groupby(spec.mixed, key=spec.mixed.get):
        query.append(f"{scheme}={_format_patterns(patterns)}")
    if spec.skip_modules is not None:
        query.append(f"skip={_format_patterns(spec.skip_modules or (NOTHING,))}")
    return f"{spec.backend}/{spec.scheme}{'?' * bool(query)}{'&'.join(query)}"


def _format_patterns(patterns: Iterable[str]) -> str:
    return "|".join(quote(pattern, safe="*[]!?.") for pattern in patterns)


def _format_value(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse_short(text: str) -> QuantPlan:
    components: dict[str, QuantSpec] = {}
    default = None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise SpecError(f"{text!r} is no plan; write none for 16 bit.")
    for part in parts:
        head, _, query = part.partition("?")
        name, equals, spec = head.rpartition("=")
        if equals and not name.strip():
            raise SpecError(f"{part!r} names no component; write component=backend/scheme.")
        name = name.strip() or "default"
        parsed = _parse_spec(spec.strip(), query, part)
        if name in components or (name == "default" and default):
            raise SpecError(f"The plan names {name} twice; name it once.")
        if name == "default":
            default = parsed
        else:
            components[name] = parsed
    return QuantPlan(components, default)


def _parse_spec(text: str, query: str, part: str) -> QuantSpec:
    backend, slash, scheme = (word.strip() for word in text.partition("/"))
    if not slash or not backend or not scheme:
        raise SpecError(f"{part!r} is no part of a plan; write component=backend/scheme, or backend/scheme for all.")
    options: dict[str, Value] = {}
    skip: tuple[str, ...] | None = None
    mixed: dict[str, str] = {}
    known = get_backend(backend)
    takes = {option.name: option for option in known.options}
    schemes = [scheme.name for scheme in known.schemes]
    for item in filter(None, query.split("&")):
        name, equals, value = item.partition("=")
        if not equals:
            raise SpecError(f"{item!r} is no option; write name=value.")
        patterns = tuple(map(unquote, value.split("|")))
        if name == "skip":
            skip = (skip or ()) + patterns
            continue
        if name in schemes:
            said, given = mixed, dict.fromkeys(patterns, name)
        elif name not in takes and any(name == of.name for other in backends().values() for of in other.schemes):
            raise SpecError(
                f"{name} is another backend's scheme; a component takes those of one, here {choices(schemes)}."
            )
        else:
            said, given = options, {name: _parse_value(name, unquote(value), takes.get(name))}
        for twice in said.keys() & given.keys():
            raise SpecError(f"{part!r} gives {twice} twice; give it once.")
        said |= given
    return QuantSpec(backend, scheme, options, skip, mixed)


def _parse_value(name: str, text: str, option: Option | None) -> Value:
    try:
        return option.parse(text) if option else text
    except ValueError as error:
        raise SpecError(f"{name} is {text!r}; {error}.") from None


def plan_from_diffusers(config: Any) -> QuantPlan:
    """A plan from the arguments of diffusers' `PipelineQuantizationConfig`, or from such an object.

    Its global mode is `quant_backend` + `quant_kwargs` (+ `components_to_quantize`), its granular mode `quant_mapping`
    (component to a config object, or to a dict with `quant_backend` and `quant_kwargs`).

    Raises:
        SpecError: both modes at once or neither, or an argument that means nothing here.
    """
    arguments = config if isinstance(config, Mapping) else {key: getattr(config, key, None) for key in _DIFFUSERS_KEYS}
    if unknown := arguments.keys() - set(_DIFFUSERS_KEYS):
        raise SpecError(f"PipelineQuantizationConfig has no {choices(unknown)}; it has {', '.join(_DIFFUSERS_KEYS)}.")
    backend, kwargs, names, mapping = (arguments.get(key) for key in _DIFFUSERS_KEYS)
    if mapping is not None and any(value not in (None, {}) for value in (backend, kwargs, names)):
        raise SpecError("Give either quant_mapping, or quant_backend with quant_kwargs; they are two different modes.")
    if not isinstance(mapping, (Mapping, type(None))):
        raise SpecError(f"quant_mapping is {mapping!r}; it maps the name of a component to its config.")
    if mapping:
        return QuantPlan({name: _spec_from_config(value) for name, value in mapping.items()})
    if backend is None:
        raise SpecError("Give quant_backend with quant_kwargs, or quant_mapping; the config has neither.")
    spec = _spec_from_upstream(backend, {} if kwargs is None else kwargs)
    names = [names] if isinstance(names, str) else [] if names is None else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise SpecError(f"components_to_quantize is {names!r}; it takes a list of component names.")
    return QuantPlan(dict.fromkeys(names, spec)) if names else QuantPlan(default=spec)  # as diffusers has it, too


def _spec_from_config(value: Any) -> QuantSpec:
    if isinstance(value, QuantSpec):
        return value
    if isinstance(value, Call):
        return _spec_from_upstream(value.name, value.arguments)
    if isinstance(value, Mapping) and "quant_backend" in value:
        if unknown := value.keys() - {"quant_backend", "quant_kwargs"}:
            raise SpecError(
                f"A config in quant_mapping has no {choices(unknown)}; it has quant_backend, quant_kwargs."
            )
        kwargs = value.get("quant_kwargs")
        return _spec_from_upstream(value["quant_backend"], {} if kwargs is None else kwargs)
    if isinstance(value, Mapping):
        return QuantSpec.from_dict(value)
    if hasattr(value, "quant_method"):
        raise SpecError(
            f"A {type(value).__name__} object has forgotten which of its arguments were given; "
            "hand over its call as text, or write a QuantSpec."
        )
    raise SpecError(f"{value!r} is no quantization config; write backend/scheme or a config class of diffusers.")


def _spec_from_upstream(name: str, arguments: Mapping[str, Any]) -> QuantSpec:
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        raise SpecError(f"quant_backend is {name!r} with {arguments!r}; it takes a name, and arguments by name.")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for backend in backends().values():
        if found := backend.upstream(name, arguments):
            return QuantSpec(backend.name, found.scheme, found.options, found.skip_modules)
    raise SpecError(f"{name} is no quantization backend known here; use one of: {choices(backends())}.")


def _parse_python(text: str) -> QuantPlan:
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise SpecError(f"The plan is no valid Python: {error.msg} in line {error.lineno}.") from None
    except (RecursionError, MemoryError, ValueError):
        raise SpecError(_UNREADABLE) from None
    node = [part for part in body if not isinstance(part, (ast.Import, ast.ImportFrom))]  # of the documentation
    if len(node) != 1 or not isinstance(node[0], (ast.Expr, ast.Assign)):
        raise SpecError("The plan must be one PipelineQuantizationConfig(...) call, and nothing else.")
    try:
        call = _read(node[0].value)
    except RecursionError:
        raise SpecError(_UNREADABLE) from None
    if not isinstance(call, Call):
        raise SpecError("The plan must be a PipelineQuantizationConfig(...) call.")
    if call.name == "PipelineQuantizationConfig":
        return plan_from_diffusers(call.arguments)
    return QuantPlan(default=_spec_from_upstream(call.name, call.arguments))


def _read(node: ast.expr) -> Any:
    """What an expression says, without running it: literals, `torch.<dtype>` by name, calls as `Call`."""
    match node:
        case ast.Constant(value=int()) if not isinstance(node.value, bool):
            return check_whole(_PLAN, node.value)
        case ast.Constant():
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -_read(node.operand)
        case ast.List() | ast.Tuple() | ast.Set():
            return [_read(item) for item in node.elts]
        case ast.Dict() if all(isinstance(key, ast.Constant) for key in node.keys):
            return once(_PLAN, ((_read(key), _read(value)) for key, value in zip(node.keys, node.values, strict=True)))
        case ast.Attribute():  # torch.bfloat16
            return node.attr
        case ast.Name():  # PerRow, handed over as a class
            return Call(node.id, {})
        case ast.Call(func=ast.Name() | ast.Attribute()):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if any(keyword.arg is None for keyword in node.keywords):
                raise SpecError(f"{name}(**...) cannot be read; write its arguments out.")
            if len(node.args) == 1 and name == "dict" or len(node.args) > 1:
                raise SpecError(f"{name} is called with arguments in order; write their names.")
            # TorchAoConfig("int8wo") is the one class whose documentation gives an argument without its name.
            given = [("quant_type", value) for value in node.args]
            given += [(keyword.arg, keyword.value) for keyword in node.keywords]
            arguments = once(_PLAN, ((argument, _read(value)) for argument, value in given))
            return arguments if name == "dict" else Call(name, arguments)
    raise SpecError(f"{ast.unparse(node)!r} cannot be read in a plan; only calls, literals and torch dtypes can.")


def without_folders(plan: QuantPlan) -> QuantPlan:
    """The plan with the names of its files alone, to be shown."""

    def bare(spec: QuantSpec) -> QuantSpec:
        paths = {option.name for option in get_backend(spec.backend).options if option.suffix}
        options = {key: os.path.basename(str(value)) if key in paths else value for key, value in spec.options.items()}
        return replace(spec, options=options)

    components = {name: bare(spec) for name, spec in plan.components.items()}
    return QuantPlan(components, bare(plan.default) if plan.default else None)
