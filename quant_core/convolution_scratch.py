"""What a convolution takes beside its input and output while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

_KERNEL = torch._C._ConvBackend
_UNFOLDING = {_KERNEL.Slow2d, _KERNEL.Slow3d, _KERNEL.SlowTranspose2d}  # all images at once
_UNFOLDING_EACH = {_KERNEL.SlowDilated2d, _KERNEL.SlowDilated3d, _KERNEL.SlowTranspose3d}  # one after the other


def convolution_scratch(arguments: Sequence[Any], result: torch.Tensor, device: torch.device) -> int:
    """Bytes that `aten.convolution` takes on the device with these arguments, which may be on the meta device.

    Which kernel computes it on a CPU depends on the dtype and on the CPU's instructions, so PyTorch is asked. Its own
    kernels write down what each position of the smaller side contributes, a value for each of the kernel's weights.
    Libraries copy what does not come channels last into the layout that they compute in: input and output, of float32
    the input only. So measured of oneDNN; cuDNN, too, computes half precision in that layout.
    """
    values, weight, groups = arguments[0], arguments[1], arguments[8]
    kernel = _kernel(arguments) if device.type == "cpu" else None
    if kernel in _UNFOLDING | _UNFOLDING_EACH:
        is_transposed = arguments[6]
        channels = weight.shape[1] if is_transposed else values.shape[1] // groups  # of one group
        positions = (values if is_transposed else result).shape[2:]
        is_plain = math.prod(weight.shape[2:]) == 1 and values.shape[2:] == result.shape[2:]
        images = len(values) if kernel in _UNFOLDING else 1
        unfolded = 0 if is_plain else images * channels * math.prod((*weight.shape[2:], *positions))
        return max(unfolded * values.element_size(), result.nbytes if groups > 1 else 0)  # which are put together
    if suggest_memory_format(values) != torch.contiguous_format:
        return 0
    return values.nbytes if values.dtype == torch.float32 else values.nbytes + result.nbytes


def _kernel(arguments: Sequence[Any]) -> Any:
    """Which one PyTorch takes on this CPU, asked with tensors of one element that are given the shapes."""
    values, weight = (torch.zeros((), dtype=given.dtype).expand(given.shape) for given in arguments[:2])
    return torch._C._select_conv_backend(values, weight, None, *arguments[3:9], None)
