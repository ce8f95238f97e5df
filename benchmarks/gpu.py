"""Speed and memory of a pipeline of Flux's shape, by plain diffusers as its guide says and by ours.

python benchmarks/gpu.py [--quick] [--check] [--scale 12B] [--minutes 60] [--only PATTERN] [--work DIR] [--out DIR]

Weights are random and made here; nothing is downloaded. Every row of speed_rows.py runs in a process of its own and is
written to gpu-SCALE-DEVICE.json, and the table beside it, as soon as it is done: a run that was cut off goes on where
it was. A row that fails is its sentence. Targets: speed_targets.py. `--device cpu --scale tiny` shows on any machine
that all of it works, and nothing about speed. 12B takes 34 GB of disk for the pipeline and 13 GB more at most.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from speed_report import page, tables, targets  # noqa: E402
from speed_rows import Row, rows, why_not  # noqa: E402
from speed_run import Task  # noqa: E402
from speed_targets import failures, verdicts  # noqa: E402

# scale -> pixels per side, steps, tokens
SETTINGS = {"tiny": (64, 3, 32), "500M": (512, 28, 512), "2B": (1024, 28, 512), "12B": (1024, 28, 512)}


def ask(command: str, task: Task, *row: str, seconds: float | None = None) -> dict[str, Any]:
    """The answer of a fresh process, of which code that was compiled before is hidden.

    Raises:
        subprocess.TimeoutExpired: it took longer than that, and was ended.
    """
    arguments = [sys.executable, ROOT / "benchmarks/speed_run.py", command, json.dumps(asdict(task)), *row]
    with tempfile.TemporaryDirectory(dir=Path(task.folder).parent, ignore_cleanup_errors=True) as code:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": code}
        process = subprocess.Popen(
            arguments,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # it has processes of its own, which compile
        )
        try:
            said, wrong = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
    if process.returncode == 0:
        return json.loads(said.splitlines()[-1])
    last = (wrong.strip().splitlines() or [""])[-1][:300]
    return {"error": f"its process ended with {process.returncode}: {last}", "refused": False}


def run(wanted: list[Row], task: Task, results: dict[str, Any], file: Path, again: bool, ends: float) -> bool:
    """Run the rows that have no result yet, each of which is written down as it is done, until the monotonic clock
    says `ends`; whether all have one."""
    known = set() if again else set(results["rows"])
    longest, stored = 0.0, None
    for row in wanted:
        if str(row) in known or why_not(row, task.device):
            continue
        if row.side == "ours" and row.scheme != stored:
            shutil.rmtree(task.store, ignore_errors=True)
            stored = row.scheme
        began = time.monotonic()
        if began + longest > ends:
            return False
        try:
            found = ask("measure", task, *row, seconds=None if ends == float("inf") else ends - began)
        except subprocess.TimeoutExpired:
            return False
        longest = max(longest, time.monotonic() - began)
        results["rows"][str(row)] = found
        write(results, file)
        said = found.get("error") or f"{found['seconds']}, peak {found['peak']['later']['allocated'] / 2**30:.2f} GiB"
        print(f"{row}: {said}", file=sys.stderr, flush=True)
    return True


def read(file: Path, settings: dict[str, Any], machine: str) -> dict[str, Any]:
    """The results there are, to go on with."""
    if not file.is_file():
        return {"settings": settings, "machine": machine, "rows": {}}
    results = json.loads(file.read_text(encoding="utf-8"))
    before, now = results["settings"] | {"machine": results["machine"]}, settings | {"machine": machine}
    if other := [
        f"{key} {before.get(key)!r}, not {value!r}" for key, value in now.items() if before.get(key) != value
    ]:
        raise SystemExit(f"{file.name} has {'; '.join(other)}: move it away, or give --out for another folder.")
    return results


def write(results: dict[str, Any], file: Path) -> None:
    """The results, whole or not at all, and the page that is made of them."""
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(results, indent=1))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)
    everything = [Row(*name.split(", ")) for name in results["rows"]]
    file.with_suffix(".md").write_text(page(results, verdicts(results, everything)), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="the guide's three rows and two of ours")
    made.add_argument("--check", action="store_true", help="exit 1 when a target is missed or a row of ours fails")
    made.add_argument(
        "--scale", choices=SETTINGS, default="12B", help="the pipeline; 12B, which is Flux.1-dev's shape"
    )
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--minutes", type=float, default=float("inf"), help="stop before so many are over")
    made.add_argument("--only", metavar="PATTERN", help="rows whose name has this, as 'ours, nf4, *, budget'")
    made.add_argument("--again", action="store_true", help="run these rows though they have results")
    made.add_argument("--images", type=int, default=3, help="how many after the first")
    made.add_argument("--steps", type=int, help="instead of the scale's own")
    made.add_argument("--size", type=int, help="pixels per side, instead of the scale's own")
    made.add_argument("--work", type=Path, default=ROOT / "out/speed", help="folder for pipelines, which stay there")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    args = parser().parse_args(arguments)
    ends = time.monotonic() + 60 * args.minutes
    os.environ.setdefault("OMP_NUM_THREADS", "1" if args.device == "cpu" else str(os.cpu_count()))
    if args.images < 1 or (args.steps or 2) < 2:
        parser().error("give at least one image and two steps; seconds of a step are from one to the next.")
    size, steps, tokens = SETTINGS[args.scale]
    settings = {"scale": args.scale, "device": args.device, "size": args.size or size, "steps": args.steps or steps}
    settings |= {"tokens": tokens, "images": args.images}
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    task = Task(**settings, folder=str(work / args.scale), store=str(work / "store"))
    wanted = [row for row in rows(args.quick) if not args.only or fnmatch.fnmatch(str(row), f"*{args.only}*")]
    if not wanted:
        parser().error(f"--only {args.only} fits no row; see speed_rows.py for their words.")
    hardware = ask("hardware", task)
    if "error" not in hardware and not Path(task.folder).is_dir():
        hardware |= ask("write", task)
    if "error" in hardware:
        raise SystemExit(hardware["error"])
    file = args.out / f"gpu-{args.scale}-{re.sub('[^A-Za-z0-9]+', '-', hardware['name'])}.json"
    results = read(file, settings, hardware["machine"])
    try:
        whole = run(wanted, task, results, file, args.again, ends)
    finally:
        shutil.rmtree(task.store, ignore_errors=True)
    found = verdicts(results, wanted)
    print("\n".join([*tables(results), "", *targets(results, found)]))
    left = sum(str(row) not in results["rows"] and not why_not(row, args.device) for row in wanted)
    if not whole:
        print(f"\nThe minutes are over and {left} rows are left; the same command goes on with them.")
    missed = args.device == "cuda" and any(verdict.met is False for verdict in found)
    return int(args.check and (missed or any(failures(results))))


if __name__ == "__main__":
    sys.exit(main())
