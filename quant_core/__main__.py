"""The command line: `python -m quant_core backends | estimate | generate | inspect | store`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

_BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 with one sentence on stderr for bad input."""
    args = _parser().parse_args(arguments)
    from .errors import QuantError

    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except QuantError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return _BAD_INPUT
    except BrokenPipeError:  # as under `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message):
        """argparse prints its usage first; the promise is one sentence."""
        print(f"{message}; see {self.prog} --help.", file=sys.stderr)
        raise SystemExit(_BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m quant_core", description="Quantized diffusers pipelines.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    backends = commands.add_parser("backends", help="what can quantize, and whether it is installed")
    backends.add_argument("--json", action="store_true", help="print JSON")
    backends.add_argument("--markdown", action="store_true", help="print the README's table")
    backends.set_defaults(run=_backends)

    shared = _Parser(add_help=False)
    shared.add_argument("model", metavar="MODEL", help="a pipeline folder, 'demo', or a hub id with --allow-download")
    shared.add_argument(
        "--plan", default="none", help="as torchao/int8wo or transformer=torchao/int8wo,...; or a .json file"
    )
    shared.add_argument("--dtype", default="bfloat16", help="of what stays unquantized: bfloat16, float16 or float32")
    shared.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    shared.add_argument("--variant", help="of the weight files, as fp16")
    shared.add_argument("--allow-download", action="store_true", help="let MODEL be a hub id")
    shared.add_argument("--revision", help="of the hub id")
    shared.add_argument("--store", metavar="FOLDER", help="that keeps quantized components; 'off' keeps none")
    shared.add_argument("--store-limit", metavar="SIZE", help="of the store, as 100GiB, which is the default")
    shared.add_argument("--json", action="store_true", help="print JSON")

    request = _Parser(add_help=False)
    request.add_argument("--negative-prompt")
    request.add_argument("--width", type=int)
    request.add_argument("--height", type=int)
    request.add_argument("--steps", type=int)
    request.add_argument("--guidance", type=float)
    request.add_argument("--seed", type=int, default=0)
    request.add_argument("--images-per-prompt", type=int)
    request.add_argument("--max-sequence-length", type=int)
    request.add_argument("--extra", default="{}", help="further arguments of the pipeline's call, as a JSON object")

    estimate = commands.add_parser("estimate", parents=[shared, request], help="say what it costs, loading nothing")
    estimate.add_argument("--prompt", action="append", help="give it again for several; default: one of 60 words")
    estimate.add_argument("--budget", help="as 8GiB, or 8G for the same: say whether it fits, or what would")
    estimate.set_defaults(run=_estimate)

    generate = commands.add_parser("generate", parents=[shared, request], help="make images from a prompt")
    generate.add_argument("--prompt", required=True, action="append", help="give it again for several")
    generate.add_argument(
        "--out", required=True, metavar="FILE.png", help="of several images: FILE-0.png, FILE-1.png, ..."
    )
    generate.set_defaults(run=_generate)

    inspect = commands.add_parser("inspect", parents=[shared], help="load and say how each component is stored")
    inspect.set_defaults(run=_inspect)

    store = commands.add_parser("store", help="what is kept of quantized components")
    store.add_argument("action", choices=("list", "verify", "prune"), help="prune: down to --limit, or all")
    store.add_argument("--store", metavar="FOLDER", help="default: where this command line keeps them")
    store.add_argument("--limit", metavar="SIZE", help="to prune to, as 20GiB; those used longest ago go first")
    store.add_argument("--json", action="store_true", help="print JSON")
    store.set_defaults(run=_store)
    return parser


def _backends(args: argparse.Namespace) -> int:
    from . import backends, missing

    rows = [
        {
            "backend": backend.name,
            "title": backend.title,
            "installed": not missing(backend.requires),
            "install": "pip install " + " ".join(map(repr, backend.requires)),
            "notice": backend.notice,
            "schemes": [
                {"scheme": scheme.name, "bits": scheme.bits, "devices": scheme.devices, "help": scheme.help}
                for scheme in backend.schemes
            ],
            "options": [
                {"option": option.name, "default": option.default, "choices": option.choices, "help": option.help}
                for option in backend.options
            ],
        }
        for backend in backends().values()
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    if args.markdown:
        print(_markdown(rows))
        return 0
    for row in rows:
        print(f"{row['backend']}: {row['title']}" + ("" if row["installed"] else f" (missing: {row['install']})"))
        if row["notice"]:
            print(f"  {row['notice']}")
        for scheme in row["schemes"]:
            print(f"  {scheme['scheme']:<14}{'/'.join(scheme['devices']):<9}  {scheme['help']}")
        for option in row["options"]:
            print(f"  ?{option['option']}={option['default']}  {option['help']}")
    return 0


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| backend | scheme | bits | runs on | |", "|---|---|---|---|---|"]
    for row in rows:
        for number, scheme in enumerate(row["schemes"]):
            first = f"**{row['backend']}**" if number == 0 else ""
            runs_on = "CUDA only" if tuple(scheme["devices"]) == ("cuda",) else "CPU, CUDA"
            bits = f"{scheme['bits']:g}" if scheme["bits"] else "any"
            lines.append(f"| {first} | `{scheme['scheme']}` | {bits} | {runs_on} | {scheme['help']} |")
    return "\n".join(lines)


def _load_request(args: argparse.Namespace, device: str) -> Any:
    from . import LoadRequest, parse_plan
    from .errors import SpecError

    text = args.plan
    if text.strip().lower().endswith(".json"):
        try:
            text = Path(text.strip()).read_text(encoding="utf-8")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise SpecError(
                f"--plan is {args.plan}, and there is no such file; give a .json file that is there, or a plan as "
                "torchao/int8wo."
            ) from None
        except UnicodeDecodeError:
            raise SpecError(f"--plan is {args.plan}, which is no text in UTF-8; give a JSON file.") from None
        except OSError as error:
            raise SpecError(f"--plan is {args.plan}, which cannot be read: {error.strerror}.") from None
    if not text.strip():
        raise SpecError("--plan is empty; write none for 16 bit.")
    return LoadRequest(
        args.model,
        parse_plan(text),
        args.dtype,
        device=device,
        variant=args.variant,
        allow_download=args.allow_download,
        revision=args.revision,
        store=args.store,
        store_limit=_bytes(args.store_limit, "--store-limit") if args.store_limit is not None else None,
    )


def _load(args: argparse.Namespace) -> Any:
    from . import load_pipeline

    request = _load_request(args, _device(args.device))
    bar = _Progress("loading")
    try:
        pipeline = load_pipeline(request, bar.load)
    finally:
        bar.end()
    return pipeline, request.device


def _generate_request(args: argparse.Namespace) -> Any:
    from . import GenerateRequest
    from .errors import SpecError

    try:
        extra = json.loads(args.extra)
    except json.JSONDecodeError:
        extra = None
    if not isinstance(extra, dict):
        raise SpecError(f"--extra is {args.extra!r}; it takes a JSON object.")
    prompt = args.prompt or [" ".join(["word"] * 60)]
    names = ("width", "height", "steps", "guidance", "seed", "images_per_prompt", "max_sequence_length")
    settings = {name: getattr(args, name) for name in names}
    return GenerateRequest(prompt if len(prompt) > 1 else prompt[0], args.negative_prompt, extra=extra, **settings)


def _estimate(args: argparse.Namespace) -> int:
    from . import estimate, estimate_data, format_estimate, what_fits

    budget = _bytes(args.budget) if args.budget is not None else None
    request = _generate_request(args)
    load = _load_request(args, args.device if args.device == "cuda" else _device(args.device))  # also of absent GPUs
    found = estimate(load, request)
    data, lines = estimate_data(found), [format_estimate(found)]
    if budget is not None:
        advice = what_fits(found, load, request, budget)
        data |= {"budget": budget, "fits": found.peak_streamed <= budget, "advice": advice}
        lines.append(advice)
    print(json.dumps(data, indent=1) if args.json else "\n".join(lines))
    return 0


def _bytes(text: str, option: str = "--budget") -> int:
    from .errors import SpecError

    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(G|GB|GiB|M|MB|MiB)?", text.strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise SpecError(f"{option} is {text!r}; it takes a size in G, GB, GiB, M, MB or MiB, as 8GiB.")
    if not found[2]:
        raise SpecError(f"{option} is {text!r}, which has no unit; write {found[1]}GiB or {found[1]}MiB.")
    units = {"m": 2**20, "mib": 2**20, "mb": 10**6, "g": 2**30, "gib": 2**30, "gb": 10**9}
    return int(float(found[1]) * units[found[2].lower()])


def _device(name: str | None) -> str:
    import torch

    from .errors import SpecError

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise SpecError(f"device is {name!r}; use one of: cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("device is 'cuda', but PyTorch finds no CUDA GPU here; use cpu.")
    return name


def _generate(args: argparse.Namespace) -> int:
    from . import generate, inspect_pipeline, report_data
    from .availability import quiet_libraries
    from .errors import SpecError
    from .picture import describe, save_png

    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise SpecError(f"--out is {args.out}; it must end in .png.")
    if out.is_dir():
        raise SpecError(f"--out is {args.out}, which is a folder; name a file.")
    if out.parent.is_dir() and not os.access(out.parent, os.W_OK):
        raise SpecError(f"--out is {args.out}, and the folder {out.parent} cannot be written.")
    if not out.parent.is_dir():
        raise SpecError(f"--out is {args.out}, and the folder {out.parent} does not exist.")
    request = _generate_request(args)
    began = time.perf_counter()
    pipeline, device = _load(args)
    with quiet_libraries():
        pipeline.pipe.to(device)
    loaded = time.perf_counter()
    bar = _Progress("generating")
    try:
        images = generate(pipeline, request, bar.step)
    finally:
        bar.end()
    done = time.perf_counter()
    record = describe(pipeline, request, args.model)
    try:
        files = save_png(images, out, record)
    except OSError as error:
        raise SpecError(f"{out} cannot be written ({error.strerror}); choose another --out.") from error
    seconds = {"load": round(loaded - began, 2), "generate": round(done - loaded, 2)}
    if args.json:
        report = report_data(inspect_pipeline(pipeline))
        print(
            json.dumps(
                {**record, "files": [str(file) for file in files], "seconds": seconds, "inspection": report}, indent=1
            )
        )
    else:
        print(f"{', '.join(map(str, files))}: loaded in {seconds['load']} s, generated in {seconds['generate']} s")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from . import format_report, inspect_pipeline, report_data

    pipeline, _ = _load(args)
    reports = inspect_pipeline(pipeline)
    print(json.dumps(report_data(reports), indent=1) if args.json else format_report(reports))
    return 0


def _store(args: argparse.Namespace) -> int:
    from . import OFF, Store, default_store
    from .errors import SpecError
    from .store import format_entries

    folder = Path(args.store or default_store()).expanduser()
    if str(folder) == OFF:
        raise SpecError("The store is off; name one with --store FOLDER.")
    if args.limit is not None and args.action != "prune":
        raise SpecError(f"--limit has no effect on store {args.action}; it belongs to store prune.")
    store = Store(folder)
    if args.action == "verify":
        wrong = store.verify()
        lines = [f"{name}: {why or 'sound'}" for name, why in sorted(wrong.items())]
        print(json.dumps({"entries": wrong}, indent=1) if args.json else "\n".join(lines or ["no entries"]))
        return int(any(wrong.values()))
    removes = args.action == "prune"
    limit = _bytes(args.limit, "--limit") if args.limit is not None else 0
    entries = store.prune(limit) if removes else store.entries()
    if args.json:
        rows = [{"name": entry.folder.name, "bytes": entry.size, **entry.manifest} for entry in entries]
        print(json.dumps({"folder": str(folder), "removed" if removes else "entries": rows}, indent=1))
    else:
        print(format_entries(entries, "removed" if removes else "in all"))
    return 0


class _Progress:
    """A line on stderr that rewrites itself, on a terminal only."""

    def __init__(self, what: str):
        from .progress import Pace

        self.what = what
        self.shown = sys.stderr.isatty()
        self.pace = Pace()

    def load(self, done: int, total: int, name: str) -> None:
        from .progress import bytes_done

        self.show(done, total, f"{bytes_done(done, total)} {name}")

    def step(self, step: Any) -> None:
        self.pace.update(step.done, step.total)
        self.show(step.done, step.total, str(self.pace))

    def show(self, done: int, total: int, text: str) -> None:
        if self.shown:
            filled = 24 * done // max(total, 1)
            bar = "#" * filled + "." * (24 - filled)
            print(f"\r{self.what} [{bar}] {text:<44}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.shown:
            print("\r" + " " * 84 + "\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
