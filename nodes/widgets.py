"""Turns what a backend declares into widgets and back, so no node knows any backend by name."""

from dataclasses import replace

from ..quant_core import (
    DTYPES,
    Backend,
    Option,
    QuantPlan,
    QuantSpec,
    Setting,
    SpecError,
    Way,
    backends,
    choose,
    get_backend,
)
from .comfy_runtime import file_fingerprint, file_path, files, io, pipeline_names

NO_FILE = "none"


def backend_choice(backend: Backend) -> io.DynamicCombo.Option:
    """A backend as one option of a combo, with its own widgets."""
    schemes = "\n".join(f"{scheme.name}: {scheme.help}" for scheme in backend.schemes)
    tooltip = "\n".join(filter(None, (backend.notice, schemes)))
    scheme = io.Combo.Input("scheme", options=[scheme.name for scheme in backend.schemes], tooltip=tooltip)
    return io.DynamicCombo.Option(backend.name, [scheme, *map(option_widget, backend.options)])


def option_widget(option: Option) -> io.Input:
    """The widget of one option."""
    of = f" Only for {', '.join(option.schemes)}." if option.schemes else ""
    common = {"default": option.default, "tooltip": option.help + of, "optional": True}
    if option.suffix:
        return io.Combo.Input(option.name, options=[NO_FILE, *files(option.suffix)], **common | {"default": NO_FILE})
    if option.choices:
        return io.Combo.Input(option.name, options=list(option.choices), **common)
    if isinstance(option.default, bool):  # before int, which bool is
        return io.Boolean.Input(option.name, **common)
    if isinstance(option.default, int):
        return io.Int.Input(option.name, min=option.minimum, max=option.maximum, **common)
    if isinstance(option.default, float):
        return io.Float.Input(option.name, min=option.minimum, max=option.maximum, step=0.01, **common)
    return io.String.Input(option.name, **common)


def way_choice(way: Way) -> io.DynamicCombo.Option:
    """A way of optimizing as one option of a combo, with its own widgets."""
    return io.DynamicCombo.Option(way.name, [option_widget(option) for option in way.options])


def setting_of(part: str, choice: dict | None) -> Setting | None:
    """The setting of a part of an optimization that its widgets say; None if they say off, or are not there.

    Raises:
        SpecError: there is no such way, or it does not take an option or its value.
    """
    settings = {name: value for name, value in (choice or {}).items() if value is not None}
    return choose(part, settings.pop(part, "off"), settings)


def plain_pipeline_inputs() -> list[io.Input]:
    """Which pipeline, as it is before a mapping."""
    return [
        io.Combo.Input("pipeline", options=pipeline_names(), tooltip="As in Load Quantized Pipeline, in 16 bit."),
        io.Combo.Input("dtype", options=list(DTYPES), default=DTYPES[0], tooltip="Of what is not quantized."),
    ]


def seed_input(tooltip: str) -> io.Input:
    """The seed of a run."""
    return io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip=tooltip)


def pictures_inputs() -> list[io.Input]:
    """How often each prompt is painted."""
    return [
        seed_input("Of the first picture of each prompt."),
        io.Int.Input("pictures", default=1, min=1, max=64, tooltip="Of each prompt, with seeds from seed on."),
    ]


def extra_input() -> io.Input:
    """What else the pipeline is called with."""
    return io.String.Input(
        "extra",
        default="",
        multiline=True,
        optional=True,
        tooltip="Further arguments of the pipeline's call as a JSON object, as in Generate.",
    )


def lines(text: str) -> list[str]:
    """What stands on the lines of a text that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def spec_of(choice: dict | None, skip_modules: str) -> QuantSpec:
    """The spec that the widgets say.

    An option that the scheme does not read may stand at its default, since its widget is there all the same.

    Raises:
        SpecError: the choice is none of ours, or it is no valid spec.
        SourceError: a file is not in ComfyUI's model folders.
    """
    if not choice or "backend" not in choice:
        raise SpecError(f"The prompt names no backend that is known here; use one of: {', '.join(backends())}.")
    settings = {name: value for name, value in choice.items() if value is not None}  # None: left out of a prompt
    backend = get_backend(settings.pop("backend"))
    scheme = settings.pop("scheme", "")
    for option in backend.options:
        value = settings.get(option.name)
        if option.suffix and value == NO_FILE or value == option.default and not option.read_by(scheme):
            del settings[option.name]
    skip = tuple(filter(None, (pattern.strip() for pattern in skip_modules.replace("\n", ",").split(","))))
    return with_file_paths(QuantSpec(backend.name, scheme, settings, skip or None))


def with_file_paths(spec: QuantSpec) -> QuantSpec:
    """The spec with the names of files in ComfyUI's model folders replaced by their paths.

    Raises:
        SourceError: a file is not there. A prompt can carry any text, so no path is taken from it.
    """
    paths = {option.name: file_path(spec.options[option.name], option.suffix) for option in _file_options(spec)}
    return replace(spec, options={**spec.options, **paths})


def plan_with_file_paths(plan: QuantPlan) -> QuantPlan:
    """The same for every spec of a plan."""
    components = {name: with_file_paths(spec) for name, spec in plan.components.items()}
    return QuantPlan(components, with_file_paths(plan.default) if plan.default else None)


def choice_stamps(choice: dict | None) -> list:
    """What changes when the files do that a choice of widgets names."""
    backend = backends().get((choice or {}).get("backend"))
    options = [option for option in backend.options if option.suffix] if backend else []
    return [file_fingerprint(choice[option.name], option.suffix) for option in options if choice.get(option.name)]


def plan_stamps(plan: QuantPlan) -> list:
    """The same for the files that a plan names."""
    specs = [*plan.components.values(), *filter(None, [plan.default])]
    return [choice_stamps({"backend": spec.backend, **spec.options}) for spec in specs]


def _file_options(spec: QuantSpec) -> list[Option]:
    return [option for option in get_backend(spec.backend).options if option.suffix and spec.options.get(option.name)]
