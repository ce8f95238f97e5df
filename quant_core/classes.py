"""The classes that a model folder names, looked up in diffusers and transformers only."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from .availability import import_diffusers, quiet_libraries
from .errors import BackendUnavailable, SourceError, one_sentence


def pipeline_class(name: str) -> type:
    """diffusers' pipeline class of that name.

    Raises:
        SourceError: diffusers has no such class.
        BackendUnavailable: it needs a package that is missing.
    """
    diffusers = import_diffusers()
    found = _lookup(diffusers, name, "The pipeline")
    if found is None or not issubclass(found, diffusers.DiffusionPipeline):
        raise SourceError(f"diffusers {diffusers.__version__} has no pipeline {name}; a newer diffusers may have it.")
    return found


def components_of(pipeline: type) -> set[str]:
    """The names of the components that a pipeline class is made of."""
    return {name for name, item in _parameters(pipeline) if _is_component(pipeline, item)}


def settings_of(pipeline: type) -> set[str]:
    """The names of what else makes a pipeline: plain values, and a component that the class makes itself."""
    return {name for name, item in _parameters(pipeline) if not _is_component(pipeline, item)}


def _parameters(pipeline: type) -> Iterable[tuple[str, inspect.Parameter]]:
    found = inspect.signature(pipeline.__init__).parameters.items()
    return ((name, item) for name, item in found if name != "self")


def _is_component(pipeline: type, item: inspect.Parameter) -> bool:
    return item.default is item.empty or item.name in pipeline._optional_components


def component_class(component: str, library: str, name: str) -> type:
    """The class that a pipeline's index names for a component, by diffusers' own rules: a library is diffusers,
    transformers or one of diffusers' pipelines, deprecated ones too, and old names stand for what they became.

    Raises:
        SourceError: neither library has it, as when it is code of the model's own, or it is no component.
        BackendUnavailable: it needs a package that is missing.
    """
    diffusers = import_diffusers()
    import transformers

    if library == "transformers":
        from diffusers.utils.deprecation_utils import _maybe_remap_transformers_class

        with quiet_libraries():
            holder, name = transformers, _maybe_remap_transformers_class(name) or name
    elif library == "diffusers":
        holder = diffusers
    else:
        pipelines = diffusers.pipelines
        holder = getattr(pipelines, library, None) or getattr(pipelines.deprecated, library, None)
    found = _lookup(holder, name, component)
    if found is None:
        raise SourceError(
            f"{component} is a {library}.{name}, which neither diffusers {diffusers.__version__} nor "
            f"transformers {transformers.__version__} has; code that comes with a model is not run."
        )
    if not issubclass(found, _loadable()):
        raise SourceError(
            f"{component} is a {library}.{name}, which is no model, scheduler, tokenizer, processor or guider."
        )
    return found


def _lookup(holder: Any, name: str, who: str) -> type | None:
    with quiet_libraries():
        found = getattr(holder, name, None)
    if not isinstance(found, type):
        return None
    if type(found).__name__ == "DummyObject":  # what both libraries have in the place of a class that lacks a package
        try:
            found()
        except ImportError as error:
            why = one_sentence(error).partition(". ")[0]
            raise BackendUnavailable(f"{who} does not load here: {why}; install it with pip.") from None
    return found


def _loadable() -> tuple[type, ...]:
    """Models, and what diffusers loads beside them."""
    import diffusers
    import transformers
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    others = [(diffusers, "diffusers"), (transformers, "transformers")]
    bases = [getattr(library, base) for library, name in others for base in LOADABLE_CLASSES[name]]
    return nn.Module, *(base for base in bases if base.__name__ not in ("DiffusionPipeline", "OnnxRuntimeModel"))


def is_several(component: type) -> bool:
    """Whether a model is several of one kind, as MultiControlNetModel: it has no config, and they are saved side by
    side, each in a folder of its own."""
    from diffusers import ConfigMixin, ModelMixin

    return issubclass(component, ModelMixin) and not issubclass(component, ConfigMixin)
