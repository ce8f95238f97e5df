"""What `cpu.py` measures in processes of their own, on a CPU.

python benchmarks/cpu_run.py KIND FOLDER STORE SIZE STEPS TURNS [...]   the figures as JSON, on the last line
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from managed import manage  # noqa: E402

from quant_core import GenerateRequest, LoadRequest, generate, load_pipeline, parse_plan  # noqa: E402
from quant_core.availability import quiet_libraries  # noqa: E402
from quant_core.optimization import optimize, parse_optimization  # noqa: E402

DTYPE, TOKENS = torch.bfloat16, 64
SHARE = 0.4  # of the transformer's bytes, of what is streamed
CACHES = ("off", "first_block,threshold=0.2", "taylor,lite,interval=3")
# The runs whose graphs are counted, each as it differs from the one before: what changes -> it
CHANGES = (
    ("first run", {}),
    ("new seed", {"seed": 1}),
    ("new prompt", {"prompt": "a sunlit meadow with three red kites above it"}),
    ("more steps", {"steps": 1}),  # beyond those of the others
    ("new size", {"size": -64}),  # pixels beside those of the others
    ("another size", {"size": 64}),
    ("the first size again", {"size": 0}),
)


def plain(folder: Path, scheme: str, compiled: bool) -> Any:
    """The pipeline as diffusers alone loads it, in 16 bit or with its transformer in torchao's int8wo."""
    import diffusers

    parts = {}
    if scheme != "none":
        from torchao.quantization import Int8WeightOnlyConfig

        parts["transformer"] = diffusers.FluxTransformer2DModel.from_pretrained(
            folder,
            subfolder="transformer",
            quantization_config=diffusers.TorchAoConfig(Int8WeightOnlyConfig()),
            dtype=DTYPE,
        )
    pipe = diffusers.FluxPipeline.from_pretrained(folder, dtype=DTYPE, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.transformer.compile_repeated_blocks()
    return pipe


def ours(folder: Path, store: Path, plan: str, **optimization: str) -> Any:
    """The pipeline as we load and optimize it."""
    pipeline = load_pipeline(LoadRequest(str(folder), parse_plan(plan), store=store))
    return optimize(pipeline, parse_optimization(**optimization))


def paint_plain(pipe: Any, seed: int, size: int, steps: int) -> torch.Tensor:
    """(N, H, W, C) in 0..1."""
    images = pipe(
        "a lake at noon",
        width=size,
        height=size,
        num_inference_steps=steps,
        max_sequence_length=TOKENS,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
    ).images
    return images.permute(0, 2, 3, 1).float()


def paint_ours(pipeline: Any, seed: int, size: int, steps: int, prompt: str = "a lake at noon") -> torch.Tensor:
    """(N, H, W, C) in 0..1; text encoders run each time."""
    request = GenerateRequest(
        prompt, width=size, height=size, steps=steps, seed=seed, max_sequence_length=TOKENS, remember=False
    )
    return generate(pipeline, request)


def overhead(folder: Path, store: Path, size: int, steps: int, turns: int, way: str) -> dict[str, Any]:
    """Seconds of processor time of the bare call and of ours, which take turns, and by how much their pictures differ
    at most."""
    pipe = plain(folder, "none", way != "off")
    pipeline = ours(folder, store, "none", compile=way)
    painters = {"diffusers": lambda seed: paint_plain(pipe, seed, size, steps)}
    painters["ours"] = lambda seed: paint_ours(pipeline, seed, size, steps)
    pictures = [paint(0) for paint in painters.values()]
    found: dict[str, Any] = {name: [] for name in painters}
    for turn in range(turns):
        for name in sorted(painters, reverse=turn % 2 == 1):
            gc.collect()
            began = time.process_time()
            painters[name](turn)
            found[name].append(time.process_time() - began)
    found["difference"] = (pictures[0] - pictures[1]).abs().max().item()
    return found | {"reports": {part: report.data() for part, report in pipeline.reports.items()}}


def graphs(folder: Path, store: Path, size: int, steps: int, turns: int) -> list[dict[str, Any]]:
    """What each of some runs traced and compiled."""
    pipeline, found = ours(folder, store, "none", compile="blocks"), []
    for name, change in CHANGES:
        prompt = change.get("prompt", "a lake at noon")
        began = time.perf_counter()
        side = size + change.get("size", 0)
        paint_ours(pipeline, change.get("seed", 0), side, steps + change.get("steps", 0), prompt)
        seconds = time.perf_counter() - began
        found.append({"run": name, "seconds": seconds} | pipeline.reports["compile"].data())
    return found


def cached(folder: Path, store: Path, size: int, steps: int, turns: int) -> dict[str, Any]:
    """Seconds of processor time of a run without and with some step caches, in turn, and what they say they did."""
    base = ours(folder, store, "none")
    handles = {text: optimize(base, parse_optimization(cache=text)) for text in CACHES}
    found: dict[str, Any] = {text: {"seconds": []} for text in CACHES}
    for turn in range(turns + 1):
        for text, handle in handles.items():
            began = time.process_time()
            paint_ours(handle, turn, size, steps)
            if turn:  # the first warms up
                found[text]["seconds"].append(time.process_time() - began)
            found[text] |= {part: report.data() for part, report in handle.reports.items()}
    return found


def memory(folder: Path, store: Path, size: int, steps: int, turns: int, kind: str, scheme: str) -> dict[str, int]:
    """The most bytes that this process holds while it loads and paints twice: all of them, and without the pages of
    mapped files at the end, which it can drop at any time (proc_pid_status(5), VmHWM and RssFile)."""
    spec = "none" if scheme == "none" else f"transformer={scheme}"
    if kind == "diffusers":
        pipe = plain(folder, scheme, compiled=False)
    else:
        pipe = ours(folder, store, spec)
        if kind == "streamed":
            manage(pipe, torch.device("cpu", 0), "budget", SHARE)  # not the CPU's own name: weights are copied
    for seed in range(2):
        (paint_plain if kind == "diffusers" else paint_ours)(pipe, seed, size, steps)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    most, files = (int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssFile"))
    return {"peak": most, "own": most - files}


KINDS = {"overhead": overhead, "graphs": graphs, "cached": cached, "memory": memory}

if __name__ == "__main__":
    kind, folder, store, size, steps, turns, *more = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with quiet_libraries(), torch.no_grad():
        found = KINDS[kind](Path(folder), Path(store), int(size), int(steps), int(turns), *more)
    print("\n" + json.dumps(found))
