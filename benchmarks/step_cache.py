"""What step caches spare and what they cost in quality, on the demo model.

python benchmarks/step_cache.py [--quick] [--check] [--save]

Each picture of 128 x 128 in 12 steps is painted without a cache and then with each. The time is the median of the
ratios to the run without, of processor time on one thread; the distance is the mean PSNR to its picture. Caches that
serve one prompt at a time are measured without guidance only, the others with a true_cfg_scale of 3, too. What a run
reuses is as the caches' own report counts it.
Target: some cache takes at most 0.7 of the time at a mean PSNR of 28 dB or more, for each kind of run.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from machine import machine  # noqa: E402
from quality_prompts import read_prompts  # noqa: E402

from quant_core import DEMO, GenerateRequest, LoadRequest, generate, load_pipeline, parse_optimization, step_cache  # noqa: E402
from quant_core.metrics import mean_psnr, psnr_each  # noqa: E402
from quant_core.request import call_arguments  # noqa: E402
from quant_core.table import aligned  # noqa: E402

PROMPTS = ROOT / "benchmarks/prompts/demo-200.jsonl"
RESULT = ROOT / "benchmarks/results/step-cache-demo.md"
TIME, PSNR = 0.7, 28.0  # of the run without, dB
STEPS, SEEDS = 12, 2
GUIDED = {"true_cfg_scale": 3.0}
EITHER = ["first_block,threshold=0.1", "first_block,threshold=0.2", "first_block,threshold=0.4"]
CACHES = {
    "guided": [
        *EITHER,
        *(f"taylor,interval={interval}" for interval in (2, 3, 5)),
        *(f"taylor,lite,interval={interval}" for interval in (2, 3, 5)),
        *(f"mag,threshold={threshold}" for threshold in (0.06, 0.12, 0.24)),
    ],
    "one prompt": [
        *EITHER,
        *(f"pyramid,spatial={interval}" for interval in (2, 3, 4)),
        *(f"faster,interval={interval}" for interval in (2, 3, 4)),
    ],
}


def paint(pipeline, request, text: str):
    """The picture, its seconds of processor time, and what was reused; None without a cache."""
    gc.collect()
    began = time.process_time()
    if not text:
        return generate(pipeline, request), time.process_time() - began, None
    setting = parse_optimization(cache=text).cache
    with step_cache.applied(pipeline, setting, call_arguments(pipeline, request)) as reuse:
        return generate(pipeline, request), time.process_time() - began, reuse


def measure(pipeline, prompts: list[str], seeds: int, extra: dict, caches: list[str]) -> list[tuple]:
    """For each cache: its text, the shares of passes reused and of work skipped, of the time, and the PSNR in dB."""
    found = {text: [] for text in caches}
    for prompt in prompts:
        for seed in range(seeds):
            request = GenerateRequest(prompt, width=128, height=128, steps=STEPS, seed=seed, extra=extra)
            plain, seconds, _ = paint(pipeline, request, "")
            for text in caches:
                image, took, reuse = paint(pipeline, request, text)
                shares = reuse.reused / reuse.passes, reuse.skipped
                found[text].append((*shares, took / seconds, *psnr_each(image, plain)))
            print(f"{prompt[:40]}, seed {seed}: done", file=sys.stderr, flush=True)
    rows = []
    for text, each in found.items():
        reused, skipped, times, distances = zip(*each, strict=True)
        mean = statistics.fmean
        rows.append((text, mean(reused), mean(skipped), statistics.median(times), mean_psnr(distances)))
    return rows


def main() -> int:
    """Print the figures; 1 if the target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one picture instead of eight")
    parser.add_argument("--check", action="store_true", help="exit 1 when the target is missed")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    args = parser.parse_args()
    prompts, _ = read_prompts(PROMPTS, 5)
    first, prompts = prompts[-1], prompts[: 1 if args.quick else 4]
    pipeline = load_pipeline(LoadRequest(DEMO))
    request = GenerateRequest(first, width=128, height=128, steps=STEPS, extra=GUIDED)
    ratios = " ".join(f"{ratio:.4f}" for ratio in paint(pipeline, request, "mag,calibrate")[2].ratios)
    lines, met = [["run", "cache", "passes reused", "work skipped", "time", "PSNR (dB)"]], []
    for kind, extra in (("guided", GUIDED), ("one prompt", {})):
        caches = [f"{text},ratios={ratios}" if text.startswith("mag") else text for text in CACHES[kind]]
        rows = measure(pipeline, prompts, 1 if args.quick else SEEDS, extra, caches)
        met.append(any(row[3] <= TIME and row[4] >= PSNR for row in rows))
        for text, *shares, distance in rows:
            name = text.split(",ratios")[0]
            lines.append([kind, name, *(f"{share:.2f}" for share in shares), f"{distance:.1f}"])
    table = "\n".join(aligned(lines, range(2, 6)))
    summary = f"ratios of mag: {ratios}\ntarget (a cache of at most {TIME} of the time at {PSNR} dB): " + (
        "met" if all(met) else "missed"
    )
    print(f"{table}\n{summary}")
    if args.save:
        text = f"# Step caches on the demo model\n\n`python benchmarks/step_cache.py --save`, {machine()}.\n\n"
        text += (
            "Passes reused and work skipped are shares as the caches' own report counts them, the time is a share of\n"
        )
        text += "the run without a cache, and the PSNR is to its picture.\n"
        RESULT.write_text(f"{text}\n```\n{table}\n{summary}\n```\n", encoding="utf-8")
    return int(args.check and not all(met))


if __name__ == "__main__":
    sys.exit(main())
