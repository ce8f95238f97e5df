"""The rows of the speed table: what is run, in which order, and which is not run and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SIDES = ("diffusers", "ours")
SHARE = 0.4  # of the transformer's bytes, which is the budget of rows that have one


class Row(NamedTuple):
    """One configuration on one side. Its text is its name in the results."""

    side: str
    scheme: str
    compile: str
    memory: str

    def __str__(self) -> str:
        return ", ".join(self)


@dataclass(frozen=True)
class Scheme:
    """Weights of one kind: our plan, all layers of it, and diffusers' words for the same."""

    plan: str
    diffusers: tuple[str, str] | None  # the config of torchao or bitsandbytes and what it takes


_T5 = ",text_encoder_2=bitsandbytes_4bit/nf4?skip=none"
SCHEMES = {
    "bf16": Scheme("none", ("none", "")),
    "nf4": Scheme(f"transformer=bitsandbytes_4bit/nf4?skip=none{_T5}", ("bitsandbytes", "nf4")),
    "int8wo": Scheme("transformer=torchao/int8wo", ("torchao", "Int8WeightOnlyConfig")),
    "int8dq": Scheme("transformer=torchao/int8dq", ("torchao", "Int8DynamicActivationInt8WeightConfig")),
    "fp8wo": Scheme("transformer=torchao/fp8wo", ("torchao", "Float8WeightOnlyConfig")),
    "fp8dq_row": Scheme("transformer=torchao/fp8dq_row", ("torchao", "Float8DynamicActivationFloat8WeightConfig")),
    "Q8_0": Scheme("transformer=gguf/Q8_0", None),
    "Q4_0": Scheme("transformer=gguf/Q4_0?skip=none", None),
}


@dataclass(frozen=True)
class Compile:
    """A way to compile: what diffusers is asked for and, as text, what ours is; None where it has no such thing."""

    diffusers: str | None
    ours: str


COMPILES = {
    "eager": Compile("nothing", "off"),
    "blocks": Compile("compile_repeated_blocks(fullgraph=True)", "blocks"),
    "whole": Compile("compile(mode='max-autotune', fullgraph=True)", "whole,mode=max-autotune-no-cudagraphs"),
    "tuned": Compile(None, "blocks,mode=max-autotune-no-cudagraphs"),
}
MEMORIES = {
    "resident": "everything stays on the device",
    "offloaded": "one component at a time is there: enable_model_cpu_offload, ours managed",
    "budget": f"{SHARE:.0%} of the transformer stays: enable_group_offload by blocks with a stream, ours managed",
}

EAGER_NF4 = Row("diffusers", "nf4", "eager", "resident")
GUIDE = (EAGER_NF4, Row("diffusers", "nf4", "whole", "resident"), Row("diffusers", "nf4", "blocks", "offloaded"))
QUICK = (
    EAGER_NF4,
    Row("ours", "nf4", "blocks", "offloaded"),
    GUIDE[1],
    Row("ours", "int8dq", "blocks", "resident"),
    GUIDE[2],
)


def rows(quick: bool) -> list[Row]:
    """What is run, the rows that targets are made of first, diffusers and ours in turn."""
    if quick:
        return list(QUICK)
    cases = [row[1:] for row in GUIDE]
    cases += [("nf4", compiled, memory) for compiled in ("eager", "blocks") for memory in ("resident", "budget")]
    cases += [(scheme, "blocks", "resident") for scheme in ("int8dq", "fp8dq_row")]
    first = [Row(side, *case) for case in cases for side in SIDES]
    every = [
        Row(side, scheme, compiled, memory)
        for scheme in SCHEMES
        for memory in MEMORIES
        for compiled, way in COMPILES.items()
        for side in SIDES
        if side == "ours" or way.diffusers
    ]
    return list(dict.fromkeys([*first, *every]))


def why_not(row: Row, device: str) -> str | None:
    """Why a row is not run on a kind of device, in words for the table."""
    if row.memory == "budget" and row.side == "ours" and row.compile == "whole":
        return "refused: compiled as a whole, its blocks must stay"
    if row.side == "diffusers" and SCHEMES[row.scheme].diffusers is None:
        return "n/a, diffusers makes no GGUF"
    if row.memory == "budget" and row.side == "diffusers" and row.scheme == "nf4" and device == "cuda":
        return "n/a, group offload leaves bitsandbytes' scales on the CPU, where its kernels do not look for them"
    if row.scheme == "int8dq" and row.compile == "eager" and device == "cuda":
        return "not run: int8dq is fast only when compiled, 40 times slower else"
    return None
