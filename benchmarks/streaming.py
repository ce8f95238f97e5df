"""What a small memory budget costs: a pipeline of Flux's shape, whole on the GPU, streamed, and as diffusers offloads.

python benchmarks/streaming.py [--quick] [--check] [--shape 12B] [--out results.json]

Transformer and T5 are in bitsandbytes nf4, with random weights: right for speed and memory, not for pictures, so the
VAE is left out. Each way runs in a process of its own: `resident`, `managed` by us with 40% and 20% of the
transformer's bytes as budget, and diffusers' `enable_model_cpu_offload`; its group offload leaves the scales of
bitsandbytes on the CPU. Ratios are to `resident`.
Target: 1.5 of the time at 40%. Without a CUDA device
the same runs on the CPU in a small shape, which shows that it works and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from estimate import save  # noqa: E402

TIME = 1.5  # of resident, with 40% of the transformer
PLAN = "transformer=bitsandbytes_4bit/nf4,text_encoder_2=bitsandbytes_4bit/nf4"
WAYS = {"resident": 1.0, "managed 40%": 0.4, "managed 20%": 0.2, "model offload": None}


def randomize(pipeline) -> None:
    """The folder holds zeros, which a GPU multiplies faster than numbers."""
    import torch

    with torch.no_grad():
        for module in pipeline.models.values():
            for weight in module.parameters():
                if hasattr(weight, "quant_state"):
                    weight.data.random_(0, 256) if weight.dtype == torch.uint8 else weight.data.random_(-128, 128)
                    weight.quant_state.absmax.fill_(0.02)
                else:
                    weight.data.normal_(0, 0.02)


def manage(pipeline, device, share: float) -> None:
    """Components on the device one after the other, the transformer within a share of its bytes."""
    import torch

    from quant_core import Placement

    home = torch.device("cpu")
    for name, module in pipeline.models.items():
        pipeline.placements[name] = Placement(module, device, home, name=name)

    placements = pipeline.placements

    def prepare(name):
        placement = placements[name]
        if share < 1:
            for other in placements.values():
                if other is not placement:
                    other.evict()
        placement.load(placement.size * (share if name == "transformer" else 1))

    pipeline.on_use(device, prepare)


def child(folder: str, way: str, images: int, size: int, steps: int) -> dict:
    """Seconds of each image and the most bytes on the device."""
    import torch

    from quant_core import GenerateRequest, LoadRequest, generate, load_pipeline, parse_plan

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu", 0)  # not the CPU's own name: weights are copied
    torch.manual_seed(0)
    pipeline = load_pipeline(LoadRequest(folder, parse_plan(PLAN), device=device.type))
    randomize(pipeline)
    if WAYS[way] is None:
        pipeline.pipe.enable_model_cpu_offload(device=device)
    else:
        manage(pipeline, device, WAYS[way])
    seconds = []
    for seed in range(images + 1):  # the first warms up
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        request = GenerateRequest(
            "a lake", width=size, height=size, steps=steps, seed=seed, remember=False, output="latents"
        )
        generate(pipeline, request)
        seconds.append(time.perf_counter() - began)
    resident = {name: placement.resident for name, placement in pipeline.placements.items()}
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "seconds": seconds[1:],
        "peak": peak,
        "resident": resident,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
    }


def main() -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 steps, one image each")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--shape", choices=("500M", "12B"), help="default: 12B with a CUDA device, else 500M")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON, too")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, way, *numbers = args.child
        print(json.dumps(child(folder, way, *map(int, numbers))))
        return 0
    import torch

    cuda = torch.cuda.is_available()
    shape = args.shape or ("12B" if cuda else "500M")
    images, steps = (1, 4) if args.quick else (3, 28)
    size = 1024 if cuda else 128
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save(shape, Path(folder))
        for way in WAYS:
            command = [sys.executable, __file__, "--child", folder, way, str(images), str(size), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it died"]
            found[way] = json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1]}
    base = found["resident"]
    print(f"{shape}, {size} x {size}, {steps} steps, {base.get('device', '?')}")
    print(f"{'':<15}{'seconds':>9}{'ratio':>8}{'peak':>12}{'ratio':>8}")
    for way, seen in found.items():
        if "error" in seen:
            print(f"{way:<15}failed: {seen['error']}")
            continue
        seconds = statistics.median(seen["seconds"])
        line = f"{way:<15}{seconds:9.2f}{seconds / statistics.median(base['seconds']):8.2f}"
        print(line + (f"{seen['peak'] / 2**30:8.2f} GiB{seen['peak'] / base['peak']:8.2f}" if seen["peak"] else ""))
    if args.out:
        args.out.write_text(json.dumps({"shape": shape, "size": size, "steps": steps, "ways": found}, indent=1))
    half = found["managed 40%"]
    missed = "error" in half or "error" in base
    if not missed and cuda:
        missed = statistics.median(half["seconds"]) > TIME * statistics.median(base["seconds"])
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
