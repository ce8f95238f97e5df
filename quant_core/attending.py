"""What computes attention in the denoiser: diffusers' attention backends, for one run at a time.

Those that download a kernel from the hub are left out: nothing here runs code that a run would fetch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .availability import quiet
from .errors import SpecError, choices, one_sentence
from .pipeline import QuantizedPipeline
from .requirements import missing
from .settings import OFF, Setting, Way

_HOST_TOO, _ALL = ("cpu", "cuda"), ()


@dataclass(frozen=True)
class _Kernel:
    """Where a backend of diffusers runs, and what it needs."""

    help: str
    devices: tuple[str, ...] = ("cuda",)  # device types; none: all
    requires: tuple[str, ...] = ()  # pip requirements; their versions are those that diffusers asks for
    install: str = ""  # where pip has none
    capability: tuple[int, int] | None = None  # the least CUDA compute capability
    half: bool = True  # on a GPU it takes bfloat16 and float16 alone


_FLASH, _SAGE = ("flash-attn>=2.6.3",), ("sageattention>=2.1.1",)
_FLASH_3 = "build FlashAttention 3 from its source, the folder hopper of flash-attention"
_KERNELS = {
    "native": _Kernel("PyTorch's attention, which chooses a kernel itself.", _ALL, half=False),
    "flex": _Kernel("PyTorch's FlexAttention, which is meant to be compiled.", _HOST_TOO, half=False),
    "flash": _Kernel("FlashAttention 2.", requires=_FLASH, capability=(8, 0)),
    "flash_varlen": _Kernel("FlashAttention 2 for masked prompts.", requires=_FLASH, capability=(8, 0)),
    "_flash_3": _Kernel("FlashAttention 3.", install=_FLASH_3, capability=(9, 0)),
    "_flash_varlen_3": _Kernel("FlashAttention 3 for masked prompts.", install=_FLASH_3, capability=(9, 0)),
    "sage": _Kernel("SageAttention, in 8 bit, with the kernel that it finds best.", requires=_SAGE, capability=(8, 0)),
    "sage_varlen": _Kernel("SageAttention for masked prompts.", requires=_SAGE, capability=(8, 0)),
    "_sage_qk_int8_pv_fp16_cuda": _Kernel("SageAttention in int8 and float16.", requires=_SAGE, capability=(8, 0)),
    "_sage_qk_int8_pv_fp16_triton": _Kernel("The same, of Triton.", requires=_SAGE, capability=(8, 0)),
    "_sage_qk_int8_pv_fp8_cuda": _Kernel("SageAttention in int8 and float8.", requires=_SAGE, capability=(9, 0)),
    "_sage_qk_int8_pv_fp8_cuda_sm90": _Kernel("The same, for Hopper GPUs.", requires=_SAGE, capability=(9, 0)),
    "xformers": _Kernel("The attention of xFormers.", requires=("xformers>=0.0.29",), half=False),
    "_native_cudnn": _Kernel("PyTorch's attention with the kernel of cuDNN.", capability=(8, 0)),
    "_native_efficient": _Kernel("PyTorch's attention with its memory-efficient kernel.", half=False),
    "_native_flash": _Kernel(
        "PyTorch's attention with its flash kernel, which takes no mask.", _HOST_TOO, capability=(8, 0)
    ),
    "_native_math": _Kernel("PyTorch's attention in plain operations: slow and exact.", _ALL, half=False),
}
WAYS = tuple(Way(name, kernel.help) for name, kernel in _KERNELS.items())


@dataclass(frozen=True)
class Attention:
    """What computed attention in a run."""

    way: str

    def __str__(self) -> str:
        return f"attention {self.way}"

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"way": self.way}


def refused(way: str) -> str:
    """Why a way of diffusers is never taken, or nothing."""
    if not way.endswith("_hub"):
        return ""
    return (
        f"attention {way} would download a kernel from the hub and run it, which is never done here; install "
        f"a package and use one of: {choices([OFF, *_KERNELS])}."
    )


def usable(device: torch.device) -> list[str]:
    """The names of the ways that are installed and run on the device."""
    return [name for name in _KERNELS if not _obstacle(name, device)]


def check(pipeline: QuantizedPipeline, setting: Setting, device: torch.device) -> None:
    """Check that this way is installed, runs on the device, and is what the pipeline's denoisers would use.

    Raises:
        SpecError: it is not.
    """
    if why := refused(setting.way):
        raise SpecError(why)
    for name in pipeline.index.denoisers:
        denoiser = pipeline.models[name]
        if not _processors(denoiser):
            raise SpecError(
                f"{type(denoiser).__name__} computes its attention in its own way; set attention to {OFF}."
            )
    if why := _obstacle(setting.way, device) or _dtype_obstacle(setting.way, device, pipeline.dtype):
        raise SpecError(
            f"attention {setting.way} does not work here: {why}; use one of: {choices([OFF, *usable(device)])}."
        )


@contextmanager
def applied(pipeline: QuantizedPipeline, setting: Setting, arguments: Mapping[str, Any]) -> Iterator[Attention]:
    """Let the denoisers compute attention this way during one run."""
    with ExitStack() as stack:
        for name in pipeline.index.denoisers:
            denoiser = pipeline.models[name]
            stack.enter_context(_restoring(denoiser))
            with quiet("diffusers"):
                denoiser.set_attention_backend(setting.way)
        yield Attention(setting.way)


@contextmanager
def _restoring(denoiser: nn.Module) -> Iterator[None]:
    """Whatever is set meanwhile, the denoiser's processors and diffusers' default for all models are as before."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    default, _ = registry.get_active_backend()
    before = [(vars(processor), dict(vars(processor))) for processor in _processors(denoiser)]
    try:
        yield
    finally:
        registry.set_active_backend(default)
        for now, own in before:
            now.clear()
            now.update(own)


def _processors(denoiser: nn.Module) -> list[Any]:
    """What computes attention in a denoiser and lets diffusers choose how."""
    found = (getattr(module, "processor", None) for module in denoiser.modules())
    return list({id(processor): processor for processor in found if hasattr(processor, "_attention_backend")}.values())


def _obstacle(way: str, device: torch.device) -> str:
    """Why the way cannot be used on a device, or nothing."""
    from diffusers.models import attention_dispatch

    kernel = _KERNELS[way]
    if kernel.devices and device.type not in kernel.devices:
        return f"it runs on {' or '.join(kernel.devices)}, not on {device.type}"
    if lacking := missing(kernel.requires):
        return f"it needs: pip install {' '.join(map(repr, lacking))}"
    try:
        attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(way))
    except RuntimeError as error:
        return kernel.install or one_sentence(error)
    if kernel.capability and device.type == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_capability(device)
        if found < kernel.capability:
            needs, has = (".".join(map(str, version)) for version in (kernel.capability, found))
            return f"it needs a GPU of compute capability {needs} or newer, and this one has {has}"
    return ""


def _dtype_obstacle(way: str, device: torch.device, dtype: torch.dtype) -> str:
    if _KERNELS[way].half and device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 or float16, and this pipeline is in {str(dtype).removeprefix('torch.')}"
    return ""
