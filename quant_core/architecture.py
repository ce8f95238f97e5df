"""The model that a component's config describes, without its weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .availability import quiet_libraries
from .errors import SourceError, is_out_of_memory, one_sentence
from .source import ComponentInfo


def is_transformers(component: type | nn.Module) -> bool:
    """Whether transformers, and not diffusers, loads this component."""
    from transformers import PreTrainedModel

    cls = component if isinstance(component, type) else type(component)
    return issubclass(cls, PreTrainedModel)


def empty_model(info: ComponentInfo, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The component with its parameters on the meta device and its buffers computed, in eval mode.

    `dtype` is PyTorch's default while it is made, as when the libraries load it in that dtype.

    Raises:
        SourceError: its config does not describe a model of its class.
    """
    from accelerate import init_empty_weights

    if info.parts:
        return info.cls([empty_model(part, dtype) for part in info.parts]).eval()
    cls, before = info.cls, torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with quiet_libraries(), torch.inference_mode(False), init_empty_weights(include_buffers=False):
            if is_transformers(cls):
                model = cls(cls.config_class.from_pretrained(info.folder, local_files_only=True))
            else:
                model = cls.from_config(copy.deepcopy(info.config))
    except Exception as error:  # a config can be wrong in as many ways as there are classes
        if is_out_of_memory(error):
            raise
        raise SourceError(
            f"{info.name}: its config.json describes no {cls.__name__} ({one_sentence(error)})."
        ) from error
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names, as parts of full module names, of what a model of this class keeps in float32 when loaded in `dtype`."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    often = getattr(model, "_keep_in_fp32_modules", None) or ()
    if dtype == torch.float16 or not is_transformers(model):  # transformers means float16 only, diffusers always
        kept |= {often} if isinstance(often, str) else set(often)
    return kept
