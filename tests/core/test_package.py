"""What is installed and imported: the two lists of dependencies agree, and importing costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "gguf",
    "optimum",
    "sympy",
    "torchao",
    "transformers",
)  # sympy: of torch._dynamo

AS_COMFYUI_DOES = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("any-name", "__init__.py")
pack = importlib.util.module_from_spec(spec)
sys.modules["any-name"] = pack
spec.loader.exec_module(pack)
"""
NODES = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests/fake_comfy")!r})
{AS_COMFYUI_DOES.replace('"__init__.py")', '"__init__.py", submodule_search_locations=["."])')}
import asyncio
extension = asyncio.run(pack.comfy_entrypoint())
assert [node.define_schema() for node in asyncio.run(extension.get_node_list())]
"""
LISTING = """
import quant_core
for backend in quant_core.backends().values():
    quant_core.missing(backend.requires)
plan = quant_core.parse_plan("transformer=gguf/Q8_0,default=bitsandbytes_4bit/nf4?double_quant=true")
assert quant_core.parse_plan(quant_core.format_plan(plan)) == plan
quant_core.parse_plan("QuantoConfig(weights_dtype='int8')")
quant_core.read_index(quant_core.find_folder("demo"))
"""


def dependencies():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def test_requirements_txt_lists_the_dependencies_of_pyproject():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert sorted(required) == sorted(dependencies())


def test_every_backend_s_packages_are_among_the_dependencies():
    from quant_core import backends

    asked = {requirement for backend in backends().values() for requirement in backend.requires}
    assert asked <= set(dependencies())


@pytest.mark.parametrize("code", [NODES, "import quant_core", LISTING], ids=["nodes", "engine", "listing"])
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    shown = f"{code}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}} & {set(HEAVY)!r}))"
    done = subprocess.run([sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_pack_imports_without_torch():
    code = f"import sys; sys.modules['torch'] = None\n{AS_COMFYUI_DOES}\nprint('torch' in dir(pack))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False")
