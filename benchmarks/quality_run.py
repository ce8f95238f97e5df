"""One plan on all prompts, and how far it is from the reference."""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from demo_model.judge import load_judge, verdicts
from demo_model.scenes import Scenes, visible
from quant_core import DEMO, OFF, GenerateRequest, LoadRequest, QuantPlan, footprint, generate, load_pipeline
from quant_core.allocator import give_back
from quant_core.availability import quiet_libraries
from quant_core.inspection import count_parameters
from quant_core.managing import on_device
from quant_core.metrics import MOST_PSNR, psnr, relative_error, ssim

JUDGE = Path(__file__).resolve().parents[1] / "demo_model/judge.safetensors"
BATCH, STEPS, SIZE, TOKENS, GUIDANCE = 20, 12, 128, 48, 3.0
SEEDS_APART = 1000  # more than there are batches


@dataclass(frozen=True)
class Task:
    """What is painted: each prompt with each seed, in batches. Batch b of seed s has the noise of 1000 s + b, so that
    no two pictures of a run share theirs, and each has the same with every plan."""

    prompts: Sequence[str]
    scenes: Scenes
    seeds: int
    device: str = "cpu"

    @property
    def batch(self) -> int:
        """Pictures of a batch."""
        return min(BATCH, len(self.prompts))


class Painted(NamedTuple):
    """What a plan painted."""

    images: torch.Tensor  # (seeds, prompts, H, W, C) in 0..1
    latents: torch.Tensor  # (seeds, prompts, steps, tokens, channels), after each step
    measured: dict[str, Any]  # footprint, bytes_16bit, peak in bytes or None, seconds_per_step of a batch

    @property
    def digest(self) -> str:
        """Of the pictures' bits."""
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()


def paint(task: Task, plan: QuantPlan) -> Painted:
    """Load the demo with a plan, paint all, and let it go.

    Seconds and peak are medians: of all steps but the first of each batch, and of the batches.

    Raises:
        BackendUnavailable, DeviceUnsupported: the plan cannot be run here.
    """
    gc.collect()
    images, latents, peaks, seconds = [], [], [], []
    with quiet_libraries():
        pipeline = load_pipeline(LoadRequest(DEMO, plan, device=task.device, store=OFF))
        on_device(pipeline, task.device)
        for seed in range(task.seeds):
            for number, start in enumerate(range(0, len(task.prompts), task.batch)):
                request = GenerateRequest(
                    list(task.prompts[start : start + task.batch]),
                    width=SIZE,
                    height=SIZE,
                    steps=STEPS,
                    max_sequence_length=TOKENS,
                    seed=SEEDS_APART * seed + number,
                    extra={"true_cfg_scale": GUIDANCE},
                )
                steps, times = [], []
                give_back()  # what earlier batches freed would hide what this one takes

                def on_step(step, steps=steps, times=times):
                    times.append(time.perf_counter())
                    steps.append(step.latents.cpu())

                images.append(generate(pipeline, request, on_step))
                latents.append(torch.stack(steps, 1))
                peaks.append(pipeline.peak)
                seconds += [after - before for before, after in zip(times, times[1:], strict=False)]
    models = pipeline.models.values()
    measured = {
        "footprint": sum(map(footprint, models)),
        "bytes_16bit": 2 * sum(map(count_parameters, models)),
        "peak": None if None in peaks else int(statistics.median(peaks)),
        "seconds_per_step": round(statistics.median(seconds), 4),
    }
    shape = task.seeds, len(task.prompts)
    return Painted(torch.cat(images).unflatten(0, shape), torch.cat(latents).unflatten(0, shape), measured)


def compare(painted: Painted, reference: Painted, task: Task) -> dict[str, Any]:
    """What is known of a plan, as plain data.

    `psnr`, `mse` and `ssim` are lists with the mean over each prompt's pictures, where an equal picture counts as
    100 dB; `right` is one with how often the judge sees in them what the prompt asks for; `attributes` has the same
    count by attribute, and `latent_errors` the mean over all pictures of the relative error after each step.
    """
    pairs = list(zip(painted.images.flatten(0, 1), reference.images.flatten(0, 1), strict=True))
    decibels = torch.tensor([min(psnr(one, other), MOST_PSNR) for one, other in pairs])
    errors = torch.tensor([(one.double() - other.double()).square().mean().item() for one, other in pairs])
    alike = torch.tensor([ssim(one[None], other[None]) for one, other in pairs])
    latents = zip(painted.latents.flatten(0, 1), reference.latents.flatten(0, 1), strict=True)
    steps = [[relative_error(*step) for step in zip(one, other, strict=True)] for one, other in latents]
    right = seen_as_asked(painted.images, task.scenes)
    shape = painted.images.shape[:2]
    return painted.measured | {
        "psnr": [round(value, 4) for value in decibels.view(shape).mean(0).tolist()],
        "mse": [float(f"{value:.4g}") for value in errors.view(shape).mean(0).tolist()],
        "ssim": [round(value, 5) for value in alike.view(shape).mean(0).tolist()],
        "right": sum(right.values()).tolist(),
        "attributes": {name: int(counts.sum()) for name, counts in right.items()},
        "latent_errors": [float(f"{value:.4g}") for value in torch.tensor(steps).mean(0).tolist()],
        "date": time.strftime("%Y-%m-%d"),
    }


def seen_as_asked(images: torch.Tensor, scenes: Scenes) -> dict[str, torch.Tensor]:
    """Attribute -> (prompts,) in how many of a prompt's pictures the judge sees what is asked for; 0 where the
    attribute cannot be seen. `images` are (seeds, prompts, H, W, C) in 0..1."""
    judge, seen = load_judge(JUDGE), visible(scenes)
    counts = {name: torch.zeros(images.shape[1], dtype=torch.int64) for name in scenes}
    for pictures in images:
        for name, found in verdicts(judge, pictures.permute(0, 3, 1, 2) * 2 - 1, scenes).items():
            counts[name][seen[name]] += found
    return counts


def asked(task: Task) -> dict[str, torch.Tensor]:
    """Attribute -> (prompts,) in how many of a prompt's pictures it can be judged."""
    return {name: seen.long() * task.seeds for name, seen in visible(task.scenes).items()}
