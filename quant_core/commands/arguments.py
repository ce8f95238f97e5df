"""Arguments that several commands take: what to load and what to generate."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import (
    TYPICAL_PROMPT,
    GenerateRequest,
    LoadRequest,
    Optimization,
    QuantizedPipeline,
    SpecError,
    Way,
    load_pipeline,
    parse_optimization,
    parse_plan,
    parse_size,
    ways,
)
from ..user_text import parse_json, read_text
from .progress_line import ProgressLine


def add_load_arguments(parser: argparse.ArgumentParser, plan: bool = True, plans: bool = False) -> None:
    """MODEL, a --plan or several `plans`, if any, and what else `load_request` reads, and --json."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a pipeline folder, 'demo' (the bundled one; a folder is ./demo), or a hub id with --allow-download",
    )
    if plans:
        parser.add_argument(
            "--plan", required=True, action="append", help="as torchao/int8wo; give it again for several"
        )
    elif plan:
        parser.add_argument(
            "--plan", default="none", help="as torchao/int8wo or transformer=torchao/int8wo,...; or a .json file"
        )
    parser.add_argument("--dtype", default="bfloat16", help="of what stays unquantized: bfloat16, float16 or float32")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--variant", help="of the weight files, as fp16")
    parser.add_argument("--allow-download", action="store_true", help="let MODEL be a hub id")
    parser.add_argument("--revision", help="of the hub id")
    parser.add_argument("--store", metavar="FOLDER", help="that keeps quantized components; 'off' keeps none")
    parser.add_argument("--store-limit", metavar="SIZE", help="of the store, as 100GiB, which is the default")
    parser.add_argument("--json", action="store_true", help="print JSON")


def load(args: argparse.Namespace) -> tuple[QuantizedPipeline, str]:
    """The pipeline that the load arguments ask for, and the device; shows progress.

    Raises:
        QuantError: as `load_request`, `choose_device` and `load_pipeline` say.
    """
    request = load_request(args, choose_device(args.device))
    with ProgressLine("loading") as line:
        return load_pipeline(request, line.load), request.device


def load_request(args: argparse.Namespace, device: str) -> LoadRequest:
    """The load arguments as a request for that device.

    Raises:
        SpecError: an argument is malformed, or the plan's file cannot be read.
    """
    return LoadRequest(
        args.model,
        parse_plan(plan_text(args.plan)),
        args.dtype,
        device=device,
        variant=args.variant,
        allow_download=args.allow_download,
        revision=args.revision,
        store=args.store,
        store_limit=parse_size(args.store_limit, "--store-limit") if args.store_limit is not None else None,
    )


def plan_text(plan: str) -> str:
    """A plan's text as it was given, or of the .json file that was named.

    Raises:
        SpecError: it is empty, or the file cannot be read.
    """
    text = plan
    if text.strip().lower().endswith(".json"):
        try:
            text = read_text(text.strip())
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise SpecError(
                f"--plan is {plan}, and there is no such file; give a .json file that is there, or a plan as "
                "torchao/int8wo."
            ) from None
        except UnicodeDecodeError:
            raise SpecError(f"--plan is {plan}, which is no text in UTF-8; give a JSON file.") from None
        except OSError as error:
            raise SpecError(f"--plan is {plan}, which cannot be read: {error.strerror}.") from None
    if not text.strip():
        raise SpecError("--plan is empty; write none for 16 bit.")
    return text


def choose_device(name: str | None) -> str:
    """The device of that name, which is there; without a name the GPU if there is one.

    Raises:
        SpecError: the name is neither cpu nor cuda, or PyTorch finds no GPU.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise SpecError(f"device is {name!r}; use one of: cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("device is 'cuda', but PyTorch finds no CUDA GPU here; use cpu.")
    return name


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """What `generate_request` reads, without --prompt, which each command asks for in its own way."""
    parser.add_argument("--negative-prompt")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images-per-prompt", type=int)
    parser.add_argument("--max-sequence-length", type=int)
    parser.add_argument("--extra", default="{}", help="further arguments of the pipeline's call, as a JSON object")


def add_optimize_arguments(parser: argparse.ArgumentParser) -> None:
    """What `optimization` reads."""
    for part in ("compile", "attention", "cache", "offload"):
        known = " ".join(f"{way.name}: {way.help}{_options(way)}" for way in ways(part))
        parser.add_argument(f"--{part}", default="off", metavar="WAY[,OPTION=VALUE...]", help=known.replace("%", "%%"))


def _options(way: Way) -> str:
    said = ", ".join(f"{option.name}={str(option.default).lower() or '...'}" for option in way.options)
    return f" Options and defaults: {said}." if said else ""


def optimization(args: argparse.Namespace) -> Optimization:
    """The optimize arguments.

    Raises:
        SpecError: one is malformed, or says what there is not.
    """
    return parse_optimization(compile=args.compile, attention=args.attention, cache=args.cache, offload=args.offload)


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """What `given_prompts` reads."""
    parser.add_argument("--prompt", action="append", default=[], help="give it again for several")
    parser.add_argument("--prompts", metavar="FILE.txt", help="one prompt per line")
    parser.add_argument(
        "--pictures", type=int, default=1, metavar="N", help="of each prompt, with seeds from --seed on"
    )


def given_prompts(args: argparse.Namespace, command: str) -> tuple[list[str], range]:
    """All prompts of the command line and of its file, and the seeds of each.

    Raises:
        SpecError: there is none, the file cannot be read, or the pictures are none.
    """
    prompts = [*args.prompt, *(_lines(args.prompts) if args.prompts is not None else [])]
    if not prompts:
        raise SpecError(f"{command} needs a prompt; give --prompt TEXT, or --prompts FILE.txt with one per line.")
    if args.pictures < 1:
        raise SpecError(f"--pictures is {args.pictures}; it takes a whole number of at least 1.")
    return prompts, range(args.seed, args.seed + args.pictures)


def _lines(path: str) -> list[str]:
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--prompts is {path}, which cannot be read ({error}); give a text file in UTF-8.") from None
    return [line.strip() for line in lines if line.strip()]


def generate_request(args: argparse.Namespace) -> GenerateRequest:
    """The generate arguments as a request; without a prompt, of one of 60 words.

    Raises:
        SpecError: an argument is malformed.
    """
    extra = parse_json("--extra", args.extra)
    if not isinstance(extra, dict):
        raise SpecError(f"--extra is {args.extra!r}; it takes a JSON object.")
    prompt = args.prompt or [TYPICAL_PROMPT]
    names = ("width", "height", "steps", "guidance", "seed", "images_per_prompt", "max_sequence_length")
    settings = {name: getattr(args, name) for name in names}
    return GenerateRequest(prompt if len(prompt) > 1 else prompt[0], args.negative_prompt, extra=extra, **settings)


def out_folder(path: str | None) -> Path | None:
    """The folder that --out names, which need not be there yet.

    Raises:
        SpecError: it is no folder, or its parent is not there.
    """
    out = Path(path) if path is not None else None
    if path == "" or out and not out.is_dir() and (out.exists() or not out.parent.is_dir()):
        raise SpecError(f"--out is {path}; name a folder, within one that is there.")
    if out:
        try:
            out.mkdir(exist_ok=True)
        except OSError as error:
            raise SpecError(f"--out is {path}, which cannot be made ({error.strerror}); choose another.") from None
    return out


def out_file(path: str | None) -> Path | None:
    """The .json file that --out names, which is there afterwards, so that nothing is computed in vain.

    Raises:
        SpecError: it is none, or cannot be written.
    """
    out = Path(path) if path is not None else None
    if out and (out.suffix != ".json" or out.is_dir() or not out.parent.is_dir()):
        raise SpecError(f"--out is {path}; name a .json file, within a folder that is there.")
    if out:
        try:
            out.touch()
        except OSError as error:
            raise SpecError(f"--out is {path}, which cannot be written ({error.strerror}); choose another.") from None
    return out
