"""One row of the speed table, measured in this process, which `gpu.py` starts for it.

python benchmarks/speed_run.py measure TASK ROW...   seconds and bytes of a row, as JSON
python benchmarks/speed_run.py write TASK            the pipeline, with random weights
python benchmarks/speed_run.py hardware TASK         the device in words, as JSON

TASK is the `Task` as JSON. The last line of what is printed is the answer; what goes wrong is its `error`,
and `refused` whether that is ours.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Task:
    """What each row does, on which device: images of that many pixels per side, of a pipeline in a folder."""

    scale: str
    device: str
    folder: str
    store: str
    size: int
    steps: int
    tokens: int  # of T5's input
    images: int  # after the first


def measure(task: Task, row) -> dict[str, Any]:
    """Seconds to load (after imports), of the first image, of each further one and of its steps; the most bytes
    while loading, for the first image and for the further ones."""
    import diffusers
    import speed_ours
    import speed_plain
    import torch
    import transformers
    from device_clock import Steps, peak, reset_peak, wait

    for name in ("FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "T5EncoderModel", "CLIPTokenizer", "T5Tokenizer"):
        getattr(transformers, name)
    if task.device == "cuda":
        device = torch.device("cuda", 0)
        torch.zeros(1, device=device)  # its context is there before the clock runs
    else:  # of ours not by the CPU's own name, so that weights are copied as to a GPU
        device = torch.device("cpu", 0) if row.side == "ours" else torch.device("cpu")
    found: dict[str, Any] = {"peak": {}}

    reset_peak(device, empty=True)
    began = time.perf_counter()
    if row.side == "ours":
        pipeline = speed_ours.load(row, Path(task.folder), device, Path(task.store))
        paint = speed_ours.painter(pipeline, task.size, task.steps, task.tokens)
        found["origins"] = {name: origin.kind for name, origin in pipeline.origins.items() if name in pipeline.specs}
    else:
        pipeline = speed_plain.load(row, Path(task.folder), device)
        paint = speed_plain.painter(pipeline, task.size, task.steps, task.tokens)
    wait(device)
    found["load"] = time.perf_counter() - began
    found["peak"]["load"] = peak(device)

    seconds, per_step, peaks = [], [], []
    for seed in range(task.images + 1):
        gc.collect()
        reset_peak(device, empty=seed < 2)  # each time: generate() resets it, too
        steps = Steps(device)
        began = time.perf_counter()
        image = paint(seed, steps.mark)
        wait(device)
        seconds.append(time.perf_counter() - began)
        per_step.append(steps.median())
        peaks.append(peak(device))
        if not image.isfinite().all():
            raise ValueError("the image has NaN in it; the weights or a kernel are wrong")
        if seed == 0 and row.side == "ours":
            found["reports"] = {part: report.data() for part, report in pipeline.reports.items()}
    found["peak"] |= {"first": peaks[0], "later": {kind: max(one[kind] for one in peaks[1:]) for kind in peaks[0]}}
    return found | {"first": seconds[0], "seconds": seconds[1:], "steps": per_step[1:]}


def write(task: Task) -> dict[str, Any]:
    """Make the pipeline's folder, whole or not at all; seconds."""
    import shutil

    from flux_shapes import write_random

    began = time.perf_counter()
    folder = Path(task.folder)
    making = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    write_random(task.scale, making, task.device)
    making.rename(folder)
    return {"seconds": time.perf_counter() - began}


def hardware(task: Task) -> dict[str, Any]:
    """The device's name, and all that figures depend on."""
    import torch
    from machine import machine

    if task.device == "cpu":
        return {"name": "cpu", "machine": machine()}
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no CUDA device; run with --device cpu --scale tiny to see that all works.")
    about = torch.cuda.get_device_properties(0)
    gpu = f"{about.name}, {about.total_memory / 2**30:.1f} GiB, compute capability {about.major}.{about.minor}"
    return {"name": about.name, "machine": f"{gpu}, CUDA {torch.version.cuda}; {machine()}"}


def main(command: str, task: str, *row: str) -> dict[str, Any]:
    """The answer to a command line."""
    commands = {"measure": measure, "write": write, "hardware": hardware}
    if command not in commands:
        raise SystemExit(f"there is no {command!r}; use one of: {', '.join(sorted(commands))}.")
    from speed_rows import Row

    from quant_core.availability import quiet_libraries
    from quant_core.errors import QuantError, one_sentence

    try:
        with quiet_libraries():
            return commands[command](Task(**json.loads(task)), *([Row(*row)] if row else ()))
    except Exception as error:  # whatever a library makes of a row is its figure
        told = f"{type(error).__name__}: {one_sentence(error)}."
        return {"error": told, "refused": isinstance(error, QuantError)}


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])), flush=True)
