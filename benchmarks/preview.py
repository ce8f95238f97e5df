"""What previews cost a run: seconds of Generate with the demo model, previews on against off.

python benchmarks/preview.py [--quick] [--check]

Both kinds of runs take turns in one process, and the median of the ratios of neighbours counts. ComfyUI is the
stand-in of the tests, whose progress bar is made to do what ComfyUI's server does with a preview, in the same thread,
where the real one has its own: fit it to its size and compress it. So this is the most that previews can cost.
Target: at most 1.05 of the time without.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = 1.05  # of the time without previews
STEPS = 12

sent = []  # bytes of each preview


def pack():
    """The node pack over the stand-in for ComfyUI."""
    sys.path.insert(0, str(ROOT / "tests/fake_comfy"))
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)
    return importlib.import_module("pack.nodes")


def send(bar, value, total=None, preview=None):
    """Instead of the stand-in's: what ComfyUI's server does with a preview (server.py, send_image)."""
    from PIL import Image, ImageOps

    if preview:
        kind, image, most = preview
        data = io.BytesIO()
        ImageOps.contain(image, (most, most), Image.Resampling.BILINEAR).save(data, kind, quality=95)
        sent.append(data.tell())


def run(nodes, pipeline, seed: int, method: str) -> float:
    """Seconds of one Generate."""
    from comfy.cli_args import LatentPreviewMethod, args

    args.preview_method = LatentPreviewMethod(method)
    gc.collect()
    began = time.perf_counter()
    nodes.Generate.execute(
        pipeline, prompt="a lake at noon", width=128, height=128, steps=STEPS, guidance=-1.0, seed=seed
    )
    return time.perf_counter() - began


def main() -> int:
    """Print the figures; 1 if the target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="7 pairs of runs instead of 25")
    parser.add_argument("--check", action="store_true", help="exit 1 when the target is missed")
    args = parser.parse_args()
    pairs = 7 if args.quick else 25
    nodes = pack()
    from comfy.utils import ProgressBar

    ProgressBar.update_absolute = send
    pipeline = nodes.LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    run(nodes, pipeline, 0, "none")
    before = run(nodes, pipeline, 0, "none")
    first = run(nodes, pipeline, 0, "auto")
    sent.clear()
    off, on = [], []
    for seed in range(pairs):
        turns = (("none", off), ("auto", on))
        for method, found in turns if seed % 2 else reversed(turns):
            found.append(run(nodes, pipeline, seed, method))
    ratio = statistics.median(with_it / without for with_it, without in zip(on, off, strict=True))
    print(f"pairs of runs: {pairs}, of {STEPS} steps each")
    print(f"without previews: {statistics.median(off):.3f} s, with: {statistics.median(on):.3f} s")
    print(f"previews in a run: {len(sent) / pairs:.1f}, of {statistics.median(sent) / 1000:.0f} kB")
    print(f"once for a pipeline, learning its colours: {first - before:.2f} s")
    print(f"time with previews: {ratio:.3f} of the time without (target {TARGET})")
    return int(args.check and (ratio > TARGET or not sent))


if __name__ == "__main__":
    sys.exit(main())
