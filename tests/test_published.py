"""What the registry publishes: all that is used, nothing else, and a README that names nothing else."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLONE = re.search(r"^### In a clone of the repository\n.*?(?=^#)", README, re.M | re.S)[0]  # speaks of the rest
NOT_GIT_S = (".git", *re.findall(r"^(\S+)/$", (ROOT / ".gitignore").read_text(), re.M))
IGNORED = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
USED = [  # by ComfyUI, by the engine and its command line, and by the README
    "LICENSE",
    "README.md",
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "benchmarks/results/*.md",
    "demo_model/pipeline/*",
    "docs/pictures/*.png",
    "example_workflows/*.json",
    "example_workflows/*.jpg",
    "nodes/*.py",
    "quant_core/*.py",
    "quant_core/*.json",
    "web/*.js",
    "web/docs/*.md",
]


def matches(path, pattern):
    """As .gitignore has it: a star is within one folder."""
    return re.match(re.escape(pattern).replace(r"\*", "[^/]*") + ("" if pattern.endswith("/") else "$"), path)


@pytest.fixture(scope="module")
def published():
    """The files that `comfy node pack` takes: those that git has, without those that .comfyignore names."""
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = found.stdout.splitlines() or [  # a copy without its history
        path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if not {*path.parts}.intersection(NOT_GIT_S)
    ]
    return {path for path in files if (ROOT / path).is_file() and not any(matches(path, line) for line in IGNORED)}


def test_nothing_is_published_that_is_not_used(published):
    assert [path for path in published if not any(fnmatch(path, pattern) for pattern in USED)] == []
    pictures = set(re.findall(r"\]\((docs/pictures/[^)]+)\)", README))
    assert {path for path in published if path.startswith("docs/")} == pictures


def test_what_is_served_over_http_is_code_and_help(published):
    assert {Path(path).suffix for path in published if path.startswith("web/")} == {".js", ".md"}


def test_the_readme_names_nothing_that_is_not_published(published):
    folders = {str(parent) for path in published for parent in Path(path).parents}
    text = README.replace(CLONE, "")
    named = re.findall(r"`((?:benchmarks|demo_model|docs|example_workflows|nodes|quant_core|web)/[\w./*-]*)`", text)
    named += re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)
    named += re.findall(r"(?<![\w/.])((?:benchmarks|demo_model|example_workflows)/[\w./-]+\.\w+)", text)
    assert [name for name in named if name.rstrip("/") not in published | folders] == []
    assert len(named) > 10 and not re.search(r"\bmake (demo|test)\b|Makefile|tests/", text)


LOAD = """
import asyncio, importlib.util, sys

sys.path.insert(0, sys.argv[1])
spec = importlib.util.spec_from_file_location("pack", "__init__.py")
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
print(*(node.define_schema().node_id for node in nodes))
"""


def test_the_published_pack_works_alone(published, tmp_path):
    for path in published:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / path)
    load = ["-c", LOAD, str(ROOT / "tests/fake_comfy")]
    estimate = ["-m", "quant_core", "estimate", "demo", "--width", "64", "--height", "64"]
    for command, said in ((load, "QDiff_Generate"), (estimate, "transformer")):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stderr


def test_the_registry_reads_which_comfyui_it_takes():
    (version,) = re.findall(r'^requires-comfyui = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert re.fullmatch(r"(==|>=|<=|!=|~=|>|<|<>|=)?\d+\.\d+\.\d+(-\w+)?", version)
    assert f"ComfyUI {'.'.join(re.findall(r'[0-9]+', version)[:2])} or newer" in README
