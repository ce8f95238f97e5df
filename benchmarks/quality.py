"""What a plan costs in quality: every backend and scheme on the demo model, against 16 bit.

python benchmarks/quality.py [--quick] [--check] [--again] [--readme] [--out FOLDER]

200 prompts are painted with 2 seeds each by 16 bit, by 16 bit again, which must be equal, and by each plan. The
results are in quality-demo.json, written after each plan: a run that was cut off goes on where it was. The table
beside it is made from them. The pictures of 16 bit are made anew in each run; should they differ from the earlier
ones, it ends, since distances from them would not be those of the rows there are. Targets: quality_targets.py.

`--readme` runs nothing and puts the page's summary and chart into the README. `--write-prompts` makes
benchmarks/prompts/demo-200.jsonl, the same on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import quality_run as run  # noqa: E402
from machine import machine  # noqa: E402
from quality_prompts import read_prompts, write_prompts  # noqa: E402
from quality_report import figures, report, tables, update_readme  # noqa: E402
from quality_targets import AUTOMATIC, check  # noqa: E402

from quant_core import (  # noqa: E402
    DEMO,
    AutoPlanRequest,
    BackendUnavailable,
    DeviceUnsupported,
    GenerateRequest,
    LoadRequest,
    SpecError,
    auto_plan,
    backends,
    format_plan,
    parse_plan,
)
from quant_core.comparison import REFERENCE  # noqa: E402

PROMPTS = ROOT / "benchmarks/prompts/demo-200.jsonl"
RESULTS = ROOT / "benchmarks/results"
BUDGETS = (12.5, 14, 16, 18, 21)  # MiB of weights
QUICK = ("bitsandbytes_4bit/nf4", "torchao/int8wo", "gguf/Q4_0")


def plans() -> dict[str, str]:
    """Label -> plan as text, of all that is measured but 16 bit itself: each scheme on all layers, those below 8 bits
    also without the layers that are left out by default, and automatic plans for a few budgets of weights."""
    schemes = {f"{backend.name}/{one.name}": one.bits for backend in backends().values() for one in backend.schemes}
    everywhere = [f"{spec}?skip=none" if bits < 8 else spec for spec, bits in schemes.items() if bits]  # no gguf/file
    by_default = [spec for spec, bits in schemes.items() if 0 < bits < 8]
    return {text: text for text in everywhere + by_default} | {
        f"{AUTOMATIC} {mib:g} MiB": AUTOMATIC for mib in BUDGETS
    }


def text_of(label: str, plan: str) -> str:
    """The plan of a label; an automatic one is found now."""
    if plan != AUTOMATIC:
        return plan
    size = int(float(label.split()[1]) * 2**20)
    run_of_one = GenerateRequest("a lake", width=run.SIZE, height=run.SIZE, max_sequence_length=run.TOKENS)
    return format_plan(auto_plan(AutoPlanRequest(LoadRequest(DEMO), run_of_one, size, "weights")).plan)


def measure(task: run.Task, wanted: dict[str, str], results: dict[str, Any], file: Path) -> None:
    """Run the plans, each of which is written down as soon as it is done."""
    reference = run.paint(task, parse_plan("none"))
    if results.setdefault("reference", reference.digest) != reference.digest:
        raise SystemExit(f"The 16-bit pictures are not those that {file.name} was measured against; give --again.")
    results["asked"] = sum(run.asked(task).values()).tolist()
    results["attributes_asked"] = {name: int(counts.sum()) for name, counts in run.asked(task).items()}
    for label, text in wanted.items():
        text = text_of(label, text)
        try:
            painted = run.paint(task, parse_plan(text))
        except (BackendUnavailable, DeviceUnsupported) as error:
            results["unable"][label] = str(error)
            continue
        if label == REFERENCE and painted.digest != reference.digest:
            raise SystemExit(
                "16 bit differs from itself from run to run; run where the same seed gives the same bits."
            )
        results["plans"][label] = {"plan": text} | run.compare(painted, reference, task)
        write(results, file)
        row = figures(results)[label]
        print(f"{label}: {row.psnr:.1f} dB, adherence {row.adherence:.1f}%", file=sys.stderr, flush=True)


def read(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results there are, to go on with."""
    if not file.is_file():
        return {"settings": settings, "unable": {}, "plans": {}}
    results = json.loads(file.read_text(encoding="utf-8"))
    before = results["settings"]
    if other := [
        f"{key} {before.get(key)!r}, not {value!r}" for key, value in settings.items() if before.get(key) != value
    ]:
        raise SystemExit(
            f"{file.name} has {'; '.join(other)}: give --again to begin anew, or --out for another folder."
        )
    return results


def write(results: dict[str, Any], file: Path) -> None:
    """The results, whole or not at all, and the page that is made of them."""
    text = json.dumps(results | {"plans": dict(sorted(results["plans"].items()))}, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)  # a list on one line
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)
    file.with_suffix(".md").write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    return report(results, list(check(figures(results))))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="three plans, 20 prompts, one seed, nothing kept")
    made.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    made.add_argument("--prompts", type=int, help=f"how many; a multiple of {run.BATCH}, or fewer than that")
    made.add_argument("--seeds", type=int, help="pictures of each prompt")
    made.add_argument("--plans", nargs="+", metavar="PLAN", help="these alone")
    made.add_argument("--device", default="cpu", help="cpu, which is the default, or cuda")
    made.add_argument("--again", action="store_true", help="run what is in the results already, or --plans of it")
    made.add_argument("--out", type=Path, help="folder for the results, else benchmarks/results")
    made.add_argument(
        "--readme", action="store_true", help="make page, README and chart of the results, and run nothing"
    )
    made.add_argument("--write-prompts", action="store_true", help="make the file of prompts, and run nothing")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    args = parser().parse_args(arguments)
    name = "quality-demo.json" if args.device == "cpu" else f"quality-demo-{args.device}.json"
    if args.write_prompts:
        write_prompts(PROMPTS)
        return 0
    if args.readme:
        file = (args.out or RESULTS) / name
        results = json.loads(file.read_text(encoding="utf-8"))
        file.with_suffix(".md").write_text(page(results), encoding="utf-8")
        update_readme(results, ROOT / "README.md", ROOT / "docs/pictures/quality.png")
        return 0
    usual = (20, 1) if args.quick else (200, 2)
    count = usual[0] if args.prompts is None else args.prompts
    seeds = usual[1] if args.seeds is None else args.seeds
    prompts, scenes = read_prompts(PROMPTS, count)
    if not 0 < count == len(prompts) or (count > run.BATCH and count % run.BATCH) or seeds < 1:
        parser().error(
            f"give up to {run.BATCH} prompts or a multiple of that, of the file's 200, and at least one seed."
        )
    every = plans()
    chosen = {label: every.get(label, label) for label in args.plans or (QUICK if args.quick else every)}
    try:
        for text in chosen.values():
            parse_plan(text if text != AUTOMATIC else "none")
    except SpecError as error:
        parser().error(str(error))
    settings = {
        "machine": machine(),
        "device": args.device,
        "prompts": count,
        "seeds": seeds,
        "asked": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        **{"steps": run.STEPS, "size": run.SIZE, "batch": min(run.BATCH, count), "guidance": run.GUIDANCE},
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = (args.out or (Path(scratch) if args.quick else RESULTS)) / name
        if args.again and not args.plans:
            file.unlink(missing_ok=True)
        results = read(file, settings)
        for label in chosen if args.again else ():
            results["plans"].pop(label, None)
            results["unable"].pop(label, None)
        known = results["plans"].keys() | results["unable"].keys()
        wanted = {label: text for label, text in ({REFERENCE: "none"} | chosen).items() if label not in known}
        if wanted:
            measure(run.Task(prompts, scenes, seeds, args.device), wanted, results, file)
            write(results, file)
    missed = list(check(figures(results)))
    print("\n".join([*tables(results), "", *(missed or ["All targets are met."])]))
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
