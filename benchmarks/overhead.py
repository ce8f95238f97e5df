"""What Generate costs beside the bare call of diffusers: seconds and peak RAM, with the demo model.

python benchmarks/overhead.py [--quick] [--check]

Seconds: the bare call, Generate, and Generate with previews take turns in one process, each on weights of its own;
the median of the ratios to the bare call of the same turn counts. Text encoders run each time (`remember` is off).
RAM: the most that a process of its own holds while it loads and paints twice. ComfyUI is the stand-in of the tests.
Targets: 1.02 of the bare call in both, 1.05 with previews on. The pictures must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from preview import ROOT, pack, send  # noqa: E402

TIME, MEMORY, PREVIEWS = 1.02, 1.02, 1.05  # of the bare call
STEPS, SIZE, PROMPT = 12, 128, "a lake at noon"


def bare():
    """A function from a seed to the picture that diffusers alone makes, (N, H, W, C) in 0..1."""
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(ROOT / "demo_model/pipeline", torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)

    def paint(seed):
        with torch.no_grad():
            generator = torch.Generator("cpu").manual_seed(seed)
            size = {"width": SIZE, "height": SIZE, "num_inference_steps": STEPS}
            images = pipe(prompt=PROMPT, generator=generator, output_type="pt", **size).images
        return images.permute(0, 2, 3, 1).float()

    return paint


def ours(previews: bool):
    """The same through our nodes."""
    nodes = pack()
    from comfy.cli_args import LatentPreviewMethod, args
    from comfy.utils import ProgressBar

    ProgressBar.update_absolute = send
    pipeline = nodes.LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    size = {"width": SIZE, "height": SIZE, "steps": STEPS, "guidance": -1.0}

    def paint(seed):
        args.preview_method = LatentPreviewMethod("auto" if previews else "none")
        return nodes.Generate.execute(pipeline, prompt=PROMPT, seed=seed, remember_prompts=False, **size)[0]

    return paint


KINDS = {"diffusers": bare, "Generate": lambda: ours(False), "with previews": lambda: ours(True)}


def seconds(turns: int) -> dict[str, list[float]]:
    """Seconds of each run of each kind."""
    import torch

    painters = {name: make() for name, make in KINDS.items()}
    pictures = [paint(0) for paint in painters.values()]
    if not all(torch.equal(picture, pictures[0]) for picture in pictures):
        raise SystemExit("The pictures differ.")
    found = {name: [] for name in KINDS}
    for turn in range(turns):
        order = list(KINDS)[turn % len(KINDS) :] + list(KINDS)[: turn % len(KINDS)]
        for name in order:
            gc.collect()
            began = time.perf_counter()
            painters[name](turn)
            found[name].append(time.perf_counter() - began)
    return found


def peak(name: str) -> int:
    """Most bytes that a fresh process of a kind holds."""
    done = subprocess.run([sys.executable, __file__, "--peak", name], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def main() -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 turns instead of 15, and one process instead of 3")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        pack()  # what it imports is in both
        paint = KINDS[args.peak]()
        paint(0), paint(1)
        status = Path("/proc/self/status").read_text()  # getrusage counts what the parent held, too
        print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
        return 0
    found = seconds(5 if args.quick else 15)
    base = found["diffusers"]
    times = {
        name: statistics.median(mine / bare for mine, bare in zip(found[name], base, strict=True)) for name in KINDS
    }
    processes = 1 if args.quick else 3
    peaks = {name: statistics.median(peak(name) for _ in range(processes)) for name in KINDS}
    print(f"turns: {len(base)}, of {STEPS} steps each; pictures the same, bit for bit")
    print("               seconds   of diffusers   peak RAM   of diffusers")
    for name in KINDS:
        more = f"{peaks[name] / 2**20:7.0f} MiB {peaks[name] / peaks['diffusers']:14.3f}"
        print(f"{name:<14}{statistics.median(found[name]):8.3f} {times[name]:14.3f} {more}")
    print(f"targets: time {TIME}, peak RAM {MEMORY}, with previews {PREVIEWS} of both")
    memory = {name: peaks[name] / peaks["diffusers"] for name in KINDS}
    missed = times["Generate"] > TIME or memory["Generate"] > MEMORY
    missed |= max(times["with previews"], memory["with previews"]) > PREVIEWS
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
