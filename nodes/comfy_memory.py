"""Pipelines as ComfyUI's memory manager sees them: one patcher per component."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.memory_management
import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ..quant_core import LoadRequest, Placement, QuantizedPipeline, dispensable, forecast, needs
from .comfy_progress import stop_if_cancelled


def load_device() -> str:
    """The type of the device that ComfyUI computes on, as `cuda`."""
    return mm.get_torch_device().type


def device_memory() -> int:
    """Bytes of the device that ComfyUI computes on, less those that it leaves to others."""
    return int(mm.get_total_memory(mm.get_torch_device()) - mm.extra_reserved_memory())


def log_forecast(request: LoadRequest) -> None:
    """Say in the log what a pipeline will take, before it is loaded."""
    device = mm.get_torch_device()
    budget = None if mm.is_device_cpu(device) else int(mm.get_total_memory(device))
    if text := forecast(request, budget):
        logging.info("%s: %s", Path(request.source).name, text)


def _pin_limit(device: torch.device) -> int:
    """Bytes of RAM that a component may lock for copies to a GPU: an eighth of what is free, or none if so asked."""
    from comfy.cli_args import args

    if device.type != "cuda" or getattr(args, "disable_pinned_memory", False):
        return 0
    return int(mm.get_free_memory(torch.device("cpu")) / 8)


def can_look_ahead(device: torch.device) -> bool:
    """Whether weights may come while something else computes: a GPU copies beside that, and what ComfyUI keeps on it
    is up to its manager."""
    return mm.is_device_cuda(device) and mm.vram_state in (mm.VRAMState.NORMAL_VRAM, mm.VRAMState.LOW_VRAM)


def release_superseded() -> None:
    """Drop what the output cache keeps of earlier prompts, before a pipeline takes the place of one of them.

    ComfyUI's default cache would keep the old one until the new one is loaded. The others drop it in time, or keep
    it because the user said so (`--cache-lru`); for them this does nothing.
    """
    release = getattr(comfy.memory_management, "extra_ram_release", None)
    if release is not None:
        release(1 << 60)


class ManagedPipeline(QuantizedPipeline):
    """A pipeline whose components ComfyUI moves on and off the GPU."""

    def __init__(self, pipeline: QuantizedPipeline):
        super().__init__(**vars(pipeline) | {"placements": {}})
        device, home = mm.get_torch_device(), torch.device("cpu")
        for name, module in self.models.items():
            self.placements[name] = Placement(
                module, device, home, check=stop_if_cancelled, name=name, pin_limit=_pin_limit(device)
            )
        self.patchers = {
            name: ComponentPatcher(name, module, self.placements[name]) for name, module in self.models.items()
        }
        self.room = None if mm.is_device_cpu(device) else device_memory()
        self._manager = _Manager(self.patchers, self.activations, self.index)
        self.on_use(device, self._manager.prepare)

    def begin(self, request) -> None:
        self._manager.begin()
        self.activations.clear()
        if not mm.is_device_cpu(self.device):  # where ComfyUI makes room for nothing
            with dispensable("estimate of the room that this run needs"):
                self.activations.update(needs(self, request))

    def step_aside(self) -> None:
        """Diffusers moves the weights in this run: it gets the device for itself."""
        super().step_aside()
        mm.unload_all_models()
        mm.soft_empty_cache()

    @property
    def patcher(self):
        """Marks this output as a model, which ComfyUI's cache drops first when RAM runs low."""
        return max(self.patchers.values(), key=ComponentPatcher.model_size)

    def is_dynamic(self) -> bool:
        """Whether ComfyUI's cache spares this output while its prompt is current, though RAM runs low: to load it
        again would need more."""
        return True


def managed(pipeline: QuantizedPipeline, device: str) -> QuantizedPipeline:
    """The pipeline under ComfyUI's memory manager, which knows the device."""
    return ManagedPipeline(pipeline)


class _Manager:
    """Asks ComfyUI for room, once for each time a component comes into use; and lets the weights of the denoiser come
    while the last text encoder computes, where there is room for both.

    ComfyUI is told of those when the denoiser comes into use: until then it is asked for no room, for its manager
    serves one thread. Whatever else comes into use first gives them up.
    """

    def __init__(self, patchers, activations, index):
        self.patchers = patchers
        self.activations = activations  # component -> bytes that it needs beside its weights in this run
        self.asked = {}  # component -> (evictions until then, activations asked for)
        self.encoders = index.text_encoders
        self.denoiser = next((name for name in index.default_reach if name not in self.encoders), None)
        self.order = []  # the components of this run, as they came into use
        self.seen = []  # those of the last run in which a text encoder ran

    def begin(self):
        if any(name in self.encoders for name in self.order):
            self.seen = self.order
        self.order = []
        self.asked.clear()

    def prepare(self, name):
        self.order.append(name)
        patcher, needed = self.patchers[name], self.activations.get(name, 0)
        is_ready = self.asked.get(name) == (patcher.placement.evictions, needed)
        for other in self.patchers.values():
            if other is not patcher and not (is_ready and other.placement.is_ahead):
                other.placement.settle()  # of blocks that were fetched ahead
        arrived = patcher.placement.arrive()
        if arrived or not is_ready:
            try:
                mm.load_models_gpu([patcher], memory_required=needed)
            except BaseException:
                if arrived:
                    patcher.placement.evict()  # the manager may not have come to know of it
                raise
            self.asked[name] = (patcher.placement.evictions, needed)
        last, following = self._expected()
        if name == last and following:
            self._look_ahead(patcher, self.patchers[following])

    def _expected(self):
        """The text encoder that will run last, and what will come into use after it."""
        for name, following in zip(self.seen, self.seen[1:], strict=False):
            if name in self.encoders and following not in self.encoders:
                return name, following
        return (self.encoders[-1] if self.encoders else None), self.denoiser

    def _look_ahead(self, encoder, following):
        """Let the weights of what follows come where that takes no room from the encoder, nor from what computes."""
        placement, device = following.placement, following.load_device
        if not can_look_ahead(device):
            return
        missing, used = placement.size - placement.resident, self.activations.get(following.name)
        if placement.is_ahead or not missing or not used or encoder.placement.streams:
            return
        needed = 1.1 * missing + used + self.activations.get(encoder.name, 0) + mm.minimum_inference_memory()
        if (lacking := needed - mm.get_free_memory(device)) > 0:
            done = self._done(encoder.name)
            if sum(patcher.loaded_size() for patcher in done) < lacking:
                return
            kept = [entry for entry in mm.current_loaded_models if entry.model not in done]
            mm.free_memory(1e30, device, keep_loaded=kept)
        if mm.get_free_memory(device) >= needed:
            placement.load_ahead()

    def _done(self, last):
        """The text encoders that did not run again in the last run, once the last one had begun."""
        if last not in self.seen:
            return []
        later = self.seen[self.seen.index(last) :]
        return [self.patchers[name] for name in self.encoders if name not in later]


class ComponentPatcher(ModelPatcher):
    """A component of a pipeline as ComfyUI's manager asks for it, with its true sizes."""

    def __init__(self, name: str, module, placement: Placement):
        super().__init__(module, placement.load_device, placement.home, size=max(placement.size, 1))
        self.name = name
        self.placement = placement

    def loaded_size(self):
        return self.placement.resident

    def current_loaded_device(self):
        return self.load_device if self.placement.resident else self.offload_device

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        """`extra_memory` is what may be used beyond what is; where negative, what should be given back."""
        if extra_memory < 0:
            return -self.placement.unload(-extra_memory)
        budget = self.placement.resident + extra_memory
        try:
            loaded = self.placement.load(budget)
        except BaseException:
            self.placement.evict()  # the manager has struck this model off its list, and would never free it
            raise
        if loaded and self.placement.streams:
            logging.info(
                "%s: %.0f of %.0f MiB stay on %s, the rest is streamed.",
                self.name,
                self.placement.resident / 2**20,
                self.placement.size / 2**20,
                self.load_device,
            )
        return loaded

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return self.placement.unload(memory_to_free)

    def detach(self, unpatch_all=True):
        """ComfyUI also calls this, with `unpatch_all` false, on a resident model each time it is asked for again."""
        if unpatch_all:
            self.placement.evict()
        return self.model

    def __del__(self):
        """ComfyUI's would copy the weights back to the CPU, only to drop them."""
