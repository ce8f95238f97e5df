"""Progress, previews and cancelling, as ComfyUI shows and asks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context

from ..quant_core import (
    GenerateRequest,
    LatentRGB,
    Pace,
    Preview,
    QuantizedPipeline,
    Step,
    bytes_done,
    latent_rgb,
    vae_channels,
)

_TEXT_INTERVAL = 0.5  # seconds
_SMALLEST = 256  # pixels along the longer side of a learned preview

# (class of the VAE, channels of its latents, their scaling factor) -> the name in comfy.latent_formats. With None
# the class and the channels say enough. The latents of diffusers while it denoises are what ComfyUI calls processed
# in, which its previews are made from.
_FORMATS = {
    ("AutoencoderKL", 4, 0.18215): "SD15",
    ("AutoencoderKL", 4, 0.13025): "SDXL",
    ("AutoencoderKL", 4, 0.5): "SDXL_Playground_2_5",
    ("AutoencoderKL", 4, 0.08333): "SD_X4",
    ("AutoencoderKL", 16, 1.5305): "SD3",
    ("AutoencoderKL", 16, 0.3611): "Flux",
    ("AutoencoderKLFlux2", 32, None): "Flux2",
    ("AutoencoderKLWan", 16, None): "Wan21",
    ("AutoencoderKLWan", 48, None): "Wan22",
    ("AutoencoderKLQwenImage", 16, None): "Wan21",
    ("AutoencoderKLLTXVideo", 128, None): "LTXV",
    ("AutoencoderKLLTX2Video", 128, None): "LTXAV",
    ("AutoencoderKLHunyuanVideo", 16, 0.476986): "HunyuanVideo",
    ("AutoencoderKLHunyuanVideo15", 32, 1.03682): "HunyuanVideo15",
    ("AutoencoderKLHunyuanImage", 64, 0.75289): "HunyuanImage21",
    ("AutoencoderKLMochi", 12, None): "Mochi",
}


def stop_if_cancelled() -> None:
    """Raise ComfyUI's interrupt where the user has asked for one."""
    mm.throw_exception_if_processing_interrupted()


def step_reporter(pipeline: QuantizedPipeline, request: GenerateRequest) -> Callable[[Step], None]:
    """A callback for each denoising step: shows progress, pace and preview, and stops when the user cancels."""
    preview = _preview(pipeline, request)
    bar, pace, text = ProgressBar(1), Pace(), _NodeText()

    def on_step(step: Step) -> None:
        stop_if_cancelled()
        bar.update_absolute(step.done, step.total, preview(step) if preview else None)
        pace.update(step.done, step.total)
        last = step.done >= step.total
        text.show(pace.summary if last else str(pace), now=last)
        if last:
            logging.info("%s: %s", pipeline, pace.summary)

    return on_step


def bytes_reporter() -> Callable[[int, int, str], None]:
    """The same for a load or a save, by bytes of the weight files."""
    bar, text = ProgressBar(1), _NodeText()

    def on_progress(done: int, total: int, name: str) -> None:
        stop_if_cancelled()
        bar.update_absolute(done, total)
        text.show(f"{bytes_done(done, total)}{', ' * bool(name)}{name}", now=done >= total)

    return on_progress


def count_reporter(tells: bool = True) -> Callable[[int, int, str], None]:
    """The same for what is counted, as pictures that are compared; `tells` is whether a text stands beside the bar."""
    bar, text = ProgressBar(1), _NodeText()

    def on_progress(done: int, total: int, label: str) -> None:
        stop_if_cancelled()
        bar.update_absolute(done, total)
        if tells:
            text.show(f"{done}/{total} {label}", now=done >= total)

    return on_progress


class _NodeText:
    """A line of text on the node that runs now, for the client that runs it."""

    def __init__(self):
        self.context = get_executing_context()
        self.shown = 0.0

    def show(self, text: str, now: bool = False) -> None:
        """Show it; no more often than every half second, unless it has to be now."""
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)  # there is none outside a running ComfyUI
        if server is None or self.context is None:
            return
        if now or time.monotonic() - self.shown >= _TEXT_INTERVAL:
            self.shown = time.monotonic()
            server.send_progress_text(text, self.context.node_id, server.client_id)


def _preview(pipeline: QuantizedPipeline, request: GenerateRequest) -> Preview | None:
    """Previews as the user's setting asks for them, each what a ProgressBar takes: format, PIL image, largest side.

    None without any, and then nothing is computed.
    """
    from comfy.cli_args import LatentPreviewMethod, args

    if args.preview_method == LatentPreviewMethod.NoPreviews:
        return None
    if known := _format(getattr(pipeline.pipe, "vae", None)):
        return _known_preview(pipeline, request, known)
    rgb = latent_rgb(pipeline)
    return Preview(pipeline, request, lambda latents: _picture(rgb, latents)) if rgb else None


def _format(vae: Any) -> Any:
    """ComfyUI's latent format for a VAE, or None."""
    import comfy.latent_formats

    for scaling in (getattr(getattr(vae, "config", None), "scaling_factor", None), None):
        name = _FORMATS.get((type(vae).__name__, vae_channels(vae), scaling))
        if found := getattr(comfy.latent_formats, name or "", None):  # an older ComfyUI may lack it
            return found()
    return None


def _known_preview(pipeline: QuantizedPipeline, request: GenerateRequest, known: Any) -> Preview | None:
    """Previews by ComfyUI's own previewer, TAESD among them."""
    import latent_preview

    previewer = latent_preview.get_previewer(mm.get_torch_device(), known)
    if previewer is None:
        return None

    def draw(latents):
        batch = latents[None, :, None] if known.latent_dimensions == 3 else latents[None]
        return previewer.decode_latent_to_preview_image("JPEG", batch)

    return Preview(pipeline, request, draw, known.latent_channels)


def _picture(rgb: LatentRGB, latents: Any) -> tuple[str, Any, int]:
    """A picture that can be seen, however few the latents, and that ComfyUI does not enlarge to no one's use."""
    from latent_preview import MAX_PREVIEW_RESOLUTION
    from PIL import Image

    image = Image.fromarray(rgb(latents).numpy())
    scale = _SMALLEST / max(image.size)
    if scale > 1:
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    return "JPEG", image, min(MAX_PREVIEW_RESOLUTION, max(image.size))
