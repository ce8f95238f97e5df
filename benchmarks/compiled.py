"""That compiled and eager agree, on the demo model: distance, pictures, graphs and time of every scheme on a CPU.

python benchmarks/compiled.py [--quick] [--check] [--only PATTERN] [--save] [--left]

Each plan leaves out no layer and runs in a process of its own, which finds no code. Distances are of one pass of the
denoiser, on the inputs that 16 bit has in a picture of 128 x 128 in 4 guided steps: the norm of the differences over
that of the results; those at another size are of code that serves any size. PSNR is the median over 6 such pictures;
seconds are of processor time on one thread, the median over 3 of them, which compiled and eager take turns in, but
those of the first run, which pass on a clock. Graphs are those of runs that differ; how many of them code was made
for is said where it is fewer. `--save` writes each plan's figures to compiled-demo.json when it is done, and the page
beside it; `--left` measures what that file lacks only.
Targets: compiled is as far from eager as 16 bit compiled is from itself, SAME times that at most, or ROUNDED times
where activations are rounded, too, since that makes a step of a difference in the last bit; it is no farther from
16 bit than eager is, FARTHER times at most; no new graphs for a seed, a prompt, more steps or a third size.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["OMP_NUM_THREADS"] = "1"

from machine import machine  # noqa: E402

RESULTS = ROOT / "benchmarks/results/compiled-demo.json"
SAME, ROUNDED, FARTHER = 1.25, 2.5, 1.05
BASE = "none"
QUICK = (BASE, "bitsandbytes_4bit/nf4?skip=none", "torchao/int8wo")
ACTIVATIONS = ("torchao/int8dq", "bitsandbytes_8bit/int8")  # rounded, too
PLANS = (
    *QUICK,
    "torchao/int8dq",
    "torchao/fp8wo",
    "torchao/nvfp4wo?skip=none",
    "bitsandbytes_4bit/fp4?skip=none",
    "bitsandbytes_8bit/int8",
    "gguf/Q8_0",
    "gguf/Q5_1?skip=none",
    "gguf/Q4_0?skip=none",
    "quanto/int8",
    "quanto/float8",
    "quanto/int2?skip=none",
)
ANEW = ("first run", "new size")  # what makes graphs
DISTANCES = ("compiled to eager", "eager to 16 bit", "compiled to 16 bit")
Figures = dict[str, Any]


def ask(plan: str) -> Figures:
    """The figures of a fresh process that finds no compiled code, or its `error`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as code:
        done = subprocess.run(
            [sys.executable, ROOT / "benchmarks/compiled_run.py", plan],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": code},
            capture_output=True,
            text=True,
        )
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["it died"]
    return {"error": lines[-1]} if done.returncode else json.loads(lines[-1])


def report(rows: dict[str, Figures]) -> Iterator[str]:
    """The figures as Markdown."""
    right = {plan: found for plan, found in rows.items() if "error" not in found}
    yield from (
        f"| plan | {' | '.join(DISTANCES)} | the first at another size | PSNR to eager (dB) |",
        f"|---|{'---:|' * (len(DISTANCES) + 2)}",
    )
    for plan, found in right.items():
        each = [*(found["distance"][name] for name in DISTANCES), found["other distance"][DISTANCES[0]]]
        yield f"| {plan} | {' | '.join(f'{value:.4f}' for value in each)} | {found['psnr']:.1f} |"
    runs = [run["run"] for run in next(iter(right.values()))["runs"]] if right else []
    yield from ("", f"| graphs | {' | '.join(runs)} |", f"|---|{'---:|' * len(runs)}")
    for plan, found in right.items():
        yield f"| {plan} | {' | '.join(map(_graphs, found['runs']))} |"
    yield from ("", "| seconds | first run | eager | compiled | ratio |", "|---|---:|---:|---:|---:|")
    for plan, found in right.items():
        eager, compiled, first = found["eager"], found["compiled"], found["runs"][0]["seconds"]
        yield f"| {plan} | {first:.1f} | {eager:.3f} | {compiled:.3f} | {compiled / eager:.2f} |"


def _graphs(run: Figures) -> str:
    graphs, made = run["graphs"], run["compiled"]
    return f"{graphs}" if graphs == made else f"{graphs}, code for {made}"


def missed(rows: dict[str, Figures]) -> Iterator[str]:
    """The targets that are missed, and what failed."""
    base = rows.get(BASE, {})
    for plan, found in rows.items():
        if "error" in found:
            yield f"{plan} failed: {found['error']}"
            continue
        for name, where in (("distance", ""), ("other distance", " (another size)")):
            yield from (line + where for line in _far(plan, found[name], base.get(name)))
        first = found["runs"][0]["graphs"]
        for run in found["runs"]:
            most = first if run["run"] in ANEW else 0
            if run["graphs"] > most:
                yield f"{plan}: {run['run']} traces {run['graphs']} graphs, at most {most}"
            if run["eager"]:
                yield f"{plan}: {run['run']} is not compiled: {run['eager']}"


def _far(plan: str, found: Figures, base: Figures | None) -> Iterator[str]:
    between, eager, compiled = (found[name] for name in DISTANCES)
    most = ROUNDED if plan in ACTIVATIONS else SAME
    if base is None:
        yield f"{plan}: there are no figures of 16 bit to compare with"
    elif between > most * base[DISTANCES[0]]:
        times = between / base[DISTANCES[0]]
        yield f"{plan}: compiled is {times:.2f} times as far from eager as in 16 bit, at most {most}"
    if plan != BASE and compiled > FARTHER * eager:
        yield f"{plan}: compiled is {compiled / eager:.3f} times as far from 16 bit as eager, at most {FARTHER}"


def write(rows: dict[str, Figures]) -> None:
    """The results, whole or not at all, and the page that is made of them."""
    ordered = {plan: rows[plan] for plan in PLANS if plan in rows}
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), "rows": ordered}, indent=1) + "\n", encoding="utf-8")
    part.replace(RESULTS)
    head = ["# Compiled against eager on the demo model", "", f"`python benchmarks/compiled.py --save`, {machine()}."]
    head += ["", "Seconds of the first run are by the clock, of a machine that others may share; the others are not."]
    RESULTS.with_suffix(".md").write_text("\n".join([*head, "", *page(ordered), ""]), encoding="utf-8")


def read() -> dict[str, Figures]:
    """The results there are, if they are of this machine."""
    if not RESULTS.is_file():
        return {}
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found["rows"] if found["machine"] == machine() else {}


def page(rows: dict[str, Figures]) -> list[str]:
    """The figures, and which targets they miss."""
    wrong = [f"- {line}" for line in missed(rows)]
    return [*report(rows), "", *(["Missed:", "", *wrong] if wrong else ["All targets are met."])]


def main() -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="plans that fit, as 'gguf/*', beside 16 bit")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(ROOT)} and its page")
    parser.add_argument("--left", action="store_true", help="what that file lacks only")
    args = parser.parse_args()
    before = read() if args.save or args.left else {}
    wanted = [plan for plan in (QUICK if args.quick else PLANS) if plan == BASE or fnmatch.fnmatch(plan, args.only)]
    rows: dict[str, Figures] = {}
    for plan in wanted:
        rows[plan] = before[plan] if args.left and plan in before else ask(plan)
        print(plan, json.dumps(rows[plan]), file=sys.stderr, flush=True)
        if args.save:
            before[plan] = rows[plan]
            write(before)
    print("\n".join(page(rows)))
    return int(args.check and any(missed(rows)))


if __name__ == "__main__":
    sys.exit(main())
