"""Progress, previews and cancelling, as ComfyUI shows and asks for them."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management as mm
from comfy.utils import ProgressBar


def step_reporter() -> Callable[[int, int], None]:
    """A callback for each denoising step: shows progress and stops when the user cancels."""
    bar = ProgressBar(1)

    def on_step(step: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(step, total)

    return on_step


def component_reporter() -> Callable[[int, int, str], None]:
    """The same for each component while loading."""
    on_step = step_reporter()
    return lambda done, total, name: on_step(done, total)
