"""Tensors of a checkpoint that no layer of its class could mean: what training, a converter or an older class left."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection

from torch import nn

from .architecture import is_transformers

_FEW = 16  # a schedule of the first Stable Diffusion has 13
_HEAD = "lm_head.weight"  # transformers' name for it, also in its `get_output_embeddings`
_COMPANION = re.compile(r"(.*_)?(weight|bias|scales?|scale_inv|zeros?|zero_points?|amax|absmax|qdata)")


def leftovers(model: nn.Module, names: Collection[str]) -> list[str]:
    """Those of the names that stand for nothing in a model that does not have them; none, where they are many.

    A weight, a bias, what may be a scale of one, what is of a further block, and what the class makes in another place
    or under another config are no leftovers.
    """
    modules = dict(model.named_modules())
    own = {name.rpartition(".")[2] for name in model.state_dict()}
    found = [name for name in names if _is_leftover(model, modules, own, name)]
    return found if len(found) <= _FEW else []


def _is_leftover(model: nn.Module, modules: dict[str, nn.Module], own: set[str], name: str) -> bool:
    if name == _HEAD:
        return is_transformers(model) and not hasattr(model, "lm_head")
    path, _, last = name.rpartition(".")
    if last in own or (path and _COMPANION.fullmatch(last)):
        return False
    module = modules.get(path)
    if module is None:  # of a part that the model is wholly without
        return path.partition(".")[0] not in modules and not re.search(r"(^|\.)\d+($|\.)", path)
    beside = [*module._parameters, *module._buffers, *module._modules]
    if "weight" in beside or any(last.startswith(f"{sibling}_") for sibling in beside):
        return False
    return not any(last in _named_by(kind) for kind in {type(module), type(model)})


def _named_by(kind: type) -> set[str]:
    """The names that making a module mentions: attributes that it sets, and those that it registers as text."""
    codes = [
        inspect.unwrap(cls.__init__).__code__
        for cls in kind.__mro__
        if issubclass(cls, nn.Module) and cls is not nn.Module and "__init__" in vars(cls)
    ]
    return {name for code in codes for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
