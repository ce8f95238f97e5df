"""What PyTorch's kernels take beside their inputs and outputs while they run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default}
_KERNEL = torch._C._ConvBackend
_UNFOLDING = {_KERNEL.Slow2d, _KERNEL.Slow3d, _KERNEL.SlowTranspose2d}  # all images at once
_UNFOLDING_EACH = {_KERNEL.SlowDilated2d, _KERNEL.SlowDilated3d, _KERNEL.SlowTranspose3d}  # one after the other


def scratch(operator: Any, arguments: Sequence[Any], result: torch.Tensor, device: torch.device) -> int:
    """Bytes that an operator takes on the device with these arguments, which may be on the meta device."""
    if operator is _ATEN.convolution.default:
        return _of_convolution(arguments, result, device)
    if operator in _PRODUCTS and device.type == "cpu" and result.dtype == torch.bfloat16 and _sums_in_float32():
        return math.prod(result.shape[-2:]) * 4  # of many matrices, one after the other
    return 0


def _sums_in_float32() -> bool:
    """Whether this CPU lets oneDNN multiply bfloat16 without having arithmetic for it."""
    takes = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.backends.mkldnn.enabled
    return takes and torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()


def _of_convolution(arguments: Sequence[Any], result: torch.Tensor, device: torch.device) -> int:
    """Which kernel computes a convolution on a CPU depends on the dtype and on the CPU's instructions, so PyTorch is
    asked. Its own kernels write down what each position of the smaller side contributes, a value for each of the
    kernel's weights. Libraries copy what does not come channels last into the layout that they compute in: input and
    output, of float32 the input only. So measured of oneDNN; cuDNN, too, computes half precision in that layout.
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
