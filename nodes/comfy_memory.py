"""Pipelines as ComfyUI's memory manager sees them."""

from __future__ import annotations

import comfy.model_management as mm
from comfy.model_patcher import ModelPatcher

from ..quant_core import QuantizedPipeline, footprint, move


def load_device() -> str:
    """The type of the device that ComfyUI computes on, as `cuda`."""
    return mm.get_torch_device().type


class ManagedPipeline(QuantizedPipeline):
    """A pipeline whose components ComfyUI moves on and off the GPU."""

    def __init__(self, pipeline: QuantizedPipeline):
        super().__init__(**vars(pipeline))
        device, offload = mm.get_torch_device(), mm.unet_offload_device()
        self.patchers = patchers = {
            name: WholeModelPatcher(module, device, offload, size=footprint(module))
            for name, module in self.models.items()
        }
        self.on_use(device, lambda name: mm.load_models_gpu([patchers[name]], force_full_load=True))

    @property
    def patcher(self):
        """Marks this output as a model, which ComfyUI's cache drops first when RAM runs low."""
        return max(self.patchers.values(), key=WholeModelPatcher.model_size)


class WholeModelPatcher(ModelPatcher):
    """Moves a model all or nothing: quantized layers cannot be cast piece by piece as ComfyUI's own can."""

    on_device = False

    def loaded_size(self):
        return self.model_size() if self.on_device else 0

    def current_loaded_device(self):
        return self.load_device if self.on_device else self.offload_device

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if self.on_device:
            return 0
        move(self.model, device_to)
        self.on_device = True
        return self.model_size()

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0

    def detach(self, unpatch_all=True):
        """ComfyUI also calls this, with `unpatch_all` false, on a resident model each time it is asked for again."""
        if unpatch_all and self.on_device:
            move(self.model, self.offload_device)
            self.on_device = False
        return self.model

    def __del__(self):
        """ComfyUI's would copy the weights back to the CPU, only to drop them."""
