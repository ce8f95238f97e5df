"""What `compiled.py` measures of one plan, in a process of its own.

python benchmarks/compiled_run.py PLAN   the figures as JSON, on the last line
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from cpu_run import CHANGES  # noqa: E402

from quant_core import DEMO, GenerateRequest, LoadRequest, generate, load_pipeline, parse_plan  # noqa: E402
from quant_core.availability import quiet_libraries  # noqa: E402
from quant_core.metrics import psnr  # noqa: E402
from quant_core.optimization import optimize, optimized, parse_optimization  # noqa: E402

SIZE, OTHER, STEPS, SEEDS, TURNS = 128, 192, 4, 6, 3  # pixels, another size's, ...


def request(seed: int = 0, side: int = SIZE, steps: int = STEPS, prompt: str = "a lake at noon") -> GenerateRequest:
    """A guided picture, of two passes a step; text encoders run each time."""
    extra = {"true_cfg_scale": 3.0}
    return GenerateRequest(prompt, width=side, height=side, steps=steps, seed=seed, remember=False, extra=extra)


def record(pipeline: Any, side: int) -> list[dict[str, Any]]:
    """The inputs of each pass of a picture's denoiser."""
    found: list[dict[str, Any]] = []

    def keep(module, arguments, named):
        found.append({name: value.clone() if torch.is_tensor(value) else value for name, value in named.items()})

    hook = pipeline.pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        generate(pipeline, request(side=side))
    finally:
        hook.remove()
    return found


def passes(pipeline: Any, inputs: list[dict[str, Any]]) -> list[torch.Tensor]:
    """What the denoiser makes of each of them, in float32."""
    with optimized(pipeline, {}):
        return [pipeline.pipe.transformer(**named)[0].float() for named in inputs]


def distance(ours: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The norm of all differences over that of the others."""
    differences = sum((one - other).square().sum() for one, other in zip(ours, others, strict=True))
    return (differences / sum(other.square().sum() for other in others)).sqrt().item()


def distances(plain: Any, eager: Any, compiled: Any, side: int) -> dict[str, float]:
    """How far passes on the inputs of the 16-bit pipeline are from one another."""
    inputs = record(plain, side)
    reference, ours, made = (passes(pipeline, inputs) for pipeline in (plain, eager, compiled))
    return {
        "compiled to eager": distance(made, ours),
        "eager to 16 bit": distance(ours, reference),
        "compiled to 16 bit": distance(made, reference),
    }


def pictures(eager: Any, compiled: Any) -> dict[str, Any]:
    """PSNR in dB of compiled to eager, and seconds of processor time of each, which take turns."""
    found: dict[str, Any] = {"psnr": [], "eager": [], "compiled": []}
    for seed in range(SEEDS):
        made = {}
        for name, pipeline in (("eager", eager), ("compiled", compiled))[:: -1 if seed % 2 else 1]:
            gc.collect()
            began = time.process_time()
            made[name] = generate(pipeline, request(seed))
            found[name].append(time.process_time() - began)
        found["psnr"].append(psnr(made["compiled"], made["eager"]))
    return {"psnr": statistics.median(found["psnr"])} | {
        name: statistics.median(found[name][-TURNS:]) for name in ("eager", "compiled")
    }


def measure(plan: str) -> dict[str, Any]:
    """All figures of a plan. Distances and pictures come before there is code for more than one size."""
    plain = load_pipeline(LoadRequest(DEMO))
    eager = plain if plan == "none" else load_pipeline(LoadRequest(DEMO, parse_plan(plan)))
    compiled, runs, found = optimize(eager, parse_optimization(compile="blocks")), [], {}
    for name, change in CHANGES:
        if name == "new size":
            found |= {"distance": distances(plain, eager, compiled, SIZE)} | pictures(eager, compiled)
        asked = request(change.get("seed", 0), SIZE + change.get("size", 0), STEPS + change.get("steps", 0))
        if "prompt" in change:
            asked = request(change.get("seed", 0), prompt=change["prompt"])
        began = time.perf_counter()
        generate(compiled, asked)
        seconds = time.perf_counter() - began
        runs.append({"run": name, "seconds": seconds} | compiled.reports["compile"].data())
        if name == "another size":
            found["other distance"] = distances(plain, eager, compiled, OTHER)
    return found | {"runs": runs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with quiet_libraries(), torch.no_grad():
        figures = measure(sys.argv[1])
    print("\n" + json.dumps(figures))
