"""What `estimate` says against what a pipeline then takes, and how long saying it takes.

Two pipelines of Flux's shape are made in a temporary folder: one of 500 million random weights, which is run, and one
of 12 billion weights that are a hole in a sparse file, which is only estimated.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
OFF = 0.10  # the most that a peak may be off
SECONDS = 20.0  # the most that estimating the large pipeline may take
SIZE = {"width": 512, "height": 512}
PLANS = ("none", "torchao/int8wo", "bitsandbytes_4bit/nf4", "gguf/Q8_0", "quanto/int8", "bitsandbytes_8bit/int8")


def save(name: str, folder: Path) -> None:
    """A pipeline of that shape: with random weights, or as configs and the headers of sparse weight files."""
    import torch
    from flux_shapes import components, save_config, write_index

    hollow = name == "12B"
    torch.manual_seed(0)
    with torch.device("meta" if hollow else "cpu"):
        made = dict(components(name))
    for part, model in made.items():
        if not hollow:
            model.to(torch.bfloat16).save_pretrained(folder / part, max_shard_size="100GB")
            continue
        (folder / part).mkdir(parents=True)
        save_config(model, folder / part)
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        header, at = {}, 0
        for key, tensor in model.state_dict().items():
            end = at + tensor.numel() * 2
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        with (folder / part / f"{stem}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    write_index(made, folder)


def child(folder: str, plan: str) -> dict:
    """Estimate, load and run in this process: the bytes said, by the allocator's record, and by the process's peak."""
    import torch

    from quant_core import GenerateRequest, LoadRequest, estimate, footprint, generate, load_pipeline, parse_plan
    from quant_core.allocator import give_back
    from tests.core.measured import measured_activations

    torch.set_num_threads(1)
    request = GenerateRequest("a lake", steps=1, **SIZE)
    load = LoadRequest(folder, parse_plan(plan))
    began = time.perf_counter()
    said = estimate(load, request)
    seconds = time.perf_counter() - began
    pipeline = load_pipeline(load)
    weights = sum(map(footprint, pipeline.models.values()))
    taken = measured_activations(pipeline, request)
    give_back()
    peak = before = _memory("RssAnon")
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    generate(pipeline, request)
    done.set()
    watcher.join()
    return {
        "plan": plan,
        "said": said.peak_resident,
        "taken": weights + max(taken.values()),
        "weights": (sum(part.footprint for part in said.components), weights),
        "activations": max(part.activations for part in said.components),
        "growth": peak - before,
        "seconds": seconds,
    }


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def time_of_large(folder: str) -> dict:
    """Seconds of an estimate of the large pipeline after the imports, and of a second one."""
    from quant_core import GenerateRequest, LoadRequest, estimate, format_estimate, parse_plan
    from quant_core.availability import import_diffusers

    import_diffusers()
    load = LoadRequest(folder, parse_plan("bitsandbytes_4bit/nf4"), device="cuda")
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        found = estimate(load, GenerateRequest("a lake"))
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "table": format_estimate(found), "memory": _memory("VmHWM")}


def _in_child(call: str) -> dict:
    code = f"import json; from benchmarks.estimate import *; print('RESULT', json.dumps({call}))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.split("RESULT ", 1)[1])


def main() -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one plan instead of six")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lines, missed = [], False
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch, "cache"))
        for name in ("500M", "12B"):
            save(name, Path(scratch, name))
        large = _in_child(f"time_of_large({str(Path(scratch, '12B'))!r})")
        for plan in PLANS[:1] if args.quick else PLANS:
            row = _in_child(f"child({str(Path(scratch, '500M'))!r}, {plan!r})")
            off = row["said"] / row["taken"] - 1
            missed |= abs(off) > OFF or row["weights"][0] != row["weights"][1]
            sizes = [value / 2**20 for value in (row["said"], row["taken"], row["activations"], row["growth"])]
            lines.append(
                f"{plan:<24} peak said {sizes[0]:7.1f} MiB, taken {sizes[1]:7.1f} ({off:+.1%}); "
                f"activations said {sizes[2]:6.1f}, growth of the process {sizes[3]:6.1f}; {row['seconds']:.1f} s"
            )
            print(lines[-1], flush=True)
    missed |= max(large["seconds"]) > SECONDS
    print(f"\n{large['table']}\n")
    first, second = large["seconds"]
    print(f"estimating 12 billion weights: {first:.1f} s, again {second:.1f} s (target {SECONDS:.0f}), ", end="")
    print(f"with {large['memory'] / 2**20:.0f} MiB of memory at most")
    print(f"every peak within {OFF:.0%} of what the allocator recorded, every footprint exact: {not missed}")
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
