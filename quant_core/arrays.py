"""Pictures as numpy arrays from a pipeline that computes in bfloat16, which numpy does not have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def arrays_of(arguments: Mapping[str, Any]) -> AbstractContextManager:
    """For the call of a pipeline with these arguments: where it is asked for arrays, bfloat16 becomes float32 in them,
    which has the same values. Older pipelines leave that to who calls them."""
    return _InFloat32() if arguments.get("output_type") == "np" else nullcontext()


class _InFloat32(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.numpy and args[0].dtype is torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))
