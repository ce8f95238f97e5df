"""Who may import whom. Ruff's banned-api guards the absolute imports; this guards the relative ones."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [  # of the engine, each importing only what stands before it
    "errors",
    "byte_size",
    "user_text",
    "allocator",
    "metrics",
    "table",
    "drawing",
    "backend",
    "requirements",
    "availability",
    "classes",
    "json_file",
    "locating",
    "source",
    "architecture",
    "headers",
    "leftovers",
    "accounting",
    "misplaced",
    "vocabulary",
    "weightless",
    "backends",
    "specs",
    "skip_lists",
    "notation",
    "checkpoint",
    "accounted",
    "transfer",
    "weight_reads",
    "layers",
    "groups",
    "groups",
    "prequantized",
    "planning",
    "container",
    "digests",
    "manifest",
    "store",
    "packed",
    "reading",
    "entries",
    "quantizing",
    "blocks",
    "lane",
    "ahead",
    "block_hooks",
    "placement",
    "memory",
    "settings",
    "pipeline",
    "hooks",
    "unchanged",
    "compiled_code",
    "compiled_forward",
    "compiling",
    "attending",
    "reuse",
    "cache_ways",
    "step_cache",
    "offloading",
    "optimization",
    "inspection",
    "layer_report",
    "layer_map",
    "layer_cells",
    "layer_drawing",
    "model_note",
    "writing",
    "saving",
    "peak",
    "loading",
    "progress",
    "texts",
    "results",
    "sizes",
    "request",
    "tiling",
    "arrays",
    "seeding",
    "sending",
    "cut_texts",
    "refusals",
    "generation",
    "hollow",
    "scratch",
    "live_bytes",
    "dry_run",
    "estimate",
    "managing",
    "comparison",
    "comparison_report",
    "comparison_picture",
    "comparison_chart",
    "picture",
    "sensitivity_data",
    "exchanging",
    "sensitivity",
    "fitting",
    "forecast",
    "inspection_picture",
    "latents",
    "preview",
    "expectation",
    "knapsack",
    "mixtures",
    "room",
    "reasons",
    "autoplan",
    "__init__",
    "commands",
    "__main__",
]


def relative_imports(path):
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *filter(None, (node.module or "").split("."))]
            yield from ([*base, alias.name] for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.glob("quant_core/**/*.py")), ids=lambda path: "/".join(path.parts[-2:]))
def test_the_engine_imports_downwards_only(path):
    own = path.relative_to(ROOT / "quant_core").with_suffix("").parts[0]
    for target in relative_imports(path):
        assert target[0] == "quant_core", "the engine imports nothing outside itself"
        layer = target[1] if target[1] in ORDER else "__init__"  # `from . import name`: the front
        if own != layer:
            assert ORDER.index(layer) < ORDER.index(own), f"{own} imports {layer}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("nodes/*.py")), ids=lambda path: path.stem)
def test_nodes_see_only_the_engine_s_front(path):
    for target in relative_imports(path):
        assert target[0] == "nodes" or target[:-1] == ["quant_core"]
        assert target != ["quant_core", "commands"], "the command line is nothing to build on"
