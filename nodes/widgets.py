"""Turns what a backend declares into widgets and back, so no node knows any backend by name."""

from ..quant_core import Backend, Option, QuantSpec, SpecError, backends, get_backend
from .comfy_runtime import file_path, files, io

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
        return io.Float.Input(option.name, min=option.minimum, max=option.maximum, step=0.1, **common)
    return io.String.Input(option.name, **common)


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
        if option.suffix and value == NO_FILE:
            del settings[option.name]
        elif option.suffix and value:
            settings[option.name] = file_path(value, option.suffix)
        elif value == option.default and option.schemes and scheme not in option.schemes:
            del settings[option.name]
    skip = tuple(filter(None, (pattern.strip() for pattern in skip_modules.replace("\n", ",").split(","))))
    return QuantSpec(backend.name, scheme, settings, skip)
