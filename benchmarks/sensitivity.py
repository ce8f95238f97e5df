"""What the sensitivity data that are shipped foretell of the demo model, against what is measured.

python benchmarks/sensitivity.py [--quick] [--check] [--save]

First, quantize all but one group of layers and see by how much the error falls: the data say by the error of that
group. Second, order the plans of quality-demo.json by the error that the data expect of them. The measure of both is
Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import json  # noqa: E402

import quality_run as run  # noqa: E402
import torch  # noqa: E402
from machine import machine  # noqa: E402
from quality_prompts import read_prompts  # noqa: E402
from quality_report import figures  # noqa: E402

from quant_core import DEMO, LoadRequest, QuantPlan, QuantSpec, expected_psnr, load_pipeline, parse_plan  # noqa: E402
from quant_core.comparison import REFERENCE  # noqa: E402
from quant_core.groups import layer_groups, plain_patterns  # noqa: E402
from quant_core.layers import linear_layers  # noqa: E402
from quant_core.metrics import error_of, mean_psnr, psnr_each  # noqa: E402
from quant_core.sensitivity_data import shipped  # noqa: E402
from quant_core.table import aligned  # noqa: E402

PROMPTS = ROOT / "benchmarks/prompts/demo-200.jsonl"
RESULTS = ROOT / "benchmarks/results"
SCHEME = "bitsandbytes_4bit/nf4"
OF_GROUPS, OF_PLANS = 0.8, 0.9  # the least rank correlations


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of the ranks, of values without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (one, other)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def without_each_group(task: run.Task) -> list[tuple[str, float, float]]:
    """For each group of each component: its name, the error that the data say it causes, and by how much the error
    falls when it alone stays in 16 bit. Both are squared errors of pictures, of their mean PSNR."""
    (data,) = [data for data in shipped() if data.model == DEMO]
    models = load_pipeline(LoadRequest(DEMO)).models
    groups = {name: layer_groups(models[name]) for name in data.components}
    layers = {name: [layer for layer, _ in linear_layers(models[name])] for name in groups}
    reference = run.paint(task, QuantPlan()).images.flatten(0, 1)

    def error(without: tuple[str, tuple[str, ...]] = ("", ())) -> float:
        skips = {name: without[1] if name == without[0] else () for name in groups}
        plan = QuantPlan({name: QuantSpec(*SCHEME.split("/"), {}, skip) for name, skip in skips.items()})
        return error_of(mean_psnr(psnr_each(run.paint(task, plan).images.flatten(0, 1), reference)))

    whole = error()
    found = []
    for name, part in data.components.items():
        for group in groups[name]:
            fall = whole - error((name, plain_patterns(group, layers[name])))
            found.append((f"{name}, {group.name}", part.groups[group.name].errors[SCHEME], fall))
            print(f"{found[-1][0]}: {found[-1][1]:.3g} expected, {fall:.3g} measured", file=sys.stderr, flush=True)
    return found


def plans() -> list[tuple[str, float, float]]:
    """For each plan of the quality table: its label, the PSNR in dB that the data expect, and the one measured."""
    results = json.loads((RESULTS / "quality-demo.json").read_text(encoding="utf-8"))
    return [
        (label, expected_psnr(LoadRequest(DEMO, parse_plan(row.plan))), row.psnr)
        for label, row in figures(results).items()
        if label != REFERENCE
    ]


def main() -> int:
    """Print both tables; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 pictures instead of 120")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sensitivity-demo.md")
    args = parser.parse_args()
    count = 20 if args.quick else 120
    groups = without_each_group(run.Task(*read_prompts(PROMPTS, count), seeds=1))
    known = plans()
    of_groups = spearman(*zip(*(row[1:] for row in groups), strict=True))
    of_plans = spearman(*zip(*(row[1:] for row in known), strict=True))
    same = sum(fall > 0 for _, _, fall in groups)
    lines = [
        "# What the sensitivity data foretell",
        "",
        f"`python benchmarks/sensitivity.py --save` on {machine()}.",
        "",
        f"Of {SCHEME} on all layers, {count} pictures of the demo model: the error that each group alone causes, as",
        "the data have it, and by how much that of the whole falls when the group stays in 16 bit; squared errors",
        "of pictures x 1e6.",
        "",
        "```",
        *aligned(
            [
                ("group", "expected", "measured"),
                *((name, f"{a * 1e6:.1f}", f"{b * 1e6:.1f}") for name, a, b in groups),
            ],
            right=(1, 2),
        ),
        "```",
        "",
        "The plans of quality-demo.md, PSNR in dB:",
        "",
        "```",
        *aligned(
            [("plan", "expected", "measured"), *((name, f"{a:.1f}", f"{b:.1f}") for name, a, b in known)], (1, 2)
        ),
        "```",
        "",
        f"Groups: correlation {of_groups:.3f} (at least {OF_GROUPS}); the error falls for {same} of {len(groups)}.",
        f"Plans: correlation {of_plans:.3f} (at least {OF_PLANS}).",
    ]
    print("\n".join(lines))
    if args.save:
        (RESULTS / "sensitivity-demo.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    missed = of_groups < OF_GROUPS or of_plans < OF_PLANS or same < len(groups)
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
