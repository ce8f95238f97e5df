"""A backend whose package is missing, too old or broken says how to mend it, and harms no other backend."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from quant_core import (
    BackendUnavailable,
    DeviceUnsupported,
    LoadRequest,
    backends,
    load_pipeline,
    missing,
    parse_plan,
    reading,
)
from quant_core.availability import ensure_runs
from quant_core.backend import Recipe

ROOT = Path(__file__).resolve().parents[2]

BROKEN = "raise RuntimeError('CUDA Setup failed despite GPU being available.\\nPlease run the following command')"
RUN = """
import sys
import torch
from quant_core import GenerateRequest, LoadRequest, QuantError, generate, inspect_pipeline, load_pipeline, parse_plan

torch.set_num_threads(1)
for plan in sys.argv[2:]:
    try:
        pipeline = load_pipeline(LoadRequest(sys.argv[1], parse_plan(plan)))
        images = generate(pipeline, GenerateRequest("a", width=16, height=16, steps=1))
        formats = {name for report in inspect_pipeline(pipeline) for name in report.formats}
        print("ran", *images.shape, *formats)
    except QuantError as error:
        print(type(error).__name__, error)
"""
REPAIR = (
    "BackendUnavailable {name} is installed but does not import (RuntimeError: CUDA Setup failed despite GPU being "
    "available); repair it: pip install --force-reinstall --no-deps '{requirement}'"
)


def run(folder, model, *plans):
    """The lines printed by a process that finds the packages in `folder` before all others."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), *plans], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("package", "plan", "requirement", "other", "formats"),
    [
        ("bitsandbytes", "bitsandbytes_4bit/nf4", "bitsandbytes>=0.48", "torchao/int8wo", "Int8Tensor"),
        ("torchao", "torchao/int8wo", "torchao>=0.18", "bitsandbytes_8bit/int8", "int8"),
        ("gguf", "gguf/Q8_0", "gguf>=0.19", "quanto/float8", "qfloat8_e4m3fn"),
    ],
)
def test_a_broken_package_is_named_and_the_others_work(tmp_path, tiny, package, plan, requirement, other, formats):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(BROKEN)
    lines = run(tmp_path, tiny("sd3"), plan, other, plan, "none")
    repair = REPAIR.format(name=plan.split("/")[0], requirement=requirement)
    assert lines == [repair, f"ran 1 16 16 3 {formats}", repair, "ran 1 16 16 3"]


@pytest.fixture
def installed(monkeypatch):
    """Let the metadata say another version of a package, or none."""
    real = metadata.version

    def pretend(**versions):
        def version(name):
            found = versions.get(name.replace("-", "_"), "") if name.replace("-", "_") in versions else real(name)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(metadata, "version", version)

    return pretend


@pytest.mark.parametrize("version", [None, "0.1", "0.1.dev3"], ids=["missing", "old", "old development version"])
@pytest.mark.parametrize(
    ("plan", "package", "line"),
    [
        ("bitsandbytes_4bit/nf4", "bitsandbytes", "bitsandbytes_4bit needs: pip install 'bitsandbytes>=0.48'"),
        ("bitsandbytes_8bit/int8", "accelerate", "bitsandbytes_8bit needs: pip install 'accelerate>=1.13'"),
        ("gguf/Q8_0", "gguf", "gguf needs: pip install 'gguf>=0.19'"),
        ("transformer=quanto/int8", "optimum_quanto", "quanto needs: pip install 'optimum-quanto>=0.2.7'"),
        ("torchao/int8wo", "torchao", "torchao needs: pip install 'torchao>=0.18'"),
    ],
)
def test_a_package_that_is_missing_or_too_old_is_asked_for(installed, tiny, monkeypatch, plan, package, line, version):
    installed(**{package: version})
    monkeypatch.setattr(reading, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(BackendUnavailable) as error:
        load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan(plan)))
    assert str(error.value) == line
    assert isinstance(error.value, ImportError)


def test_several_packages_are_asked_for_in_one_line(installed, tiny):
    installed(bitsandbytes=None, accelerate="1.0")
    with pytest.raises(BackendUnavailable, match="pip install 'bitsandbytes>=0.48' 'accelerate>=1.13'"):
        load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan("bitsandbytes_4bit/nf4")))


def test_newer_versions_and_development_versions_will_do(installed):
    installed(torchao="99.0.dev20300101+git", gguf="0.19")
    assert missing(backends()["torchao"].requires) == missing(backends()["gguf"].requires) == []


@pytest.mark.parametrize("placeholder", [None, "0.0.0"], ids=["missing", "placeholder"])
def test_a_scheme_s_own_package_is_asked_for_only_by_that_scheme(tiny, installed, placeholder):
    installed(mslk_cuda=None, mslk=placeholder)  # PyPI's mslk has no module
    with pytest.raises(BackendUnavailable) as error:
        load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan("torchao/fp8dq_int4wo")))
    assert str(error.value) == "torchao/fp8dq_int4wo needs: pip install 'mslk-cuda>=1.0.0'"
    with pytest.raises(BackendUnavailable) as error:
        load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan("torchao/int4wo?packing=plain")))
    assert str(error.value) == "torchao/int4wo with packing plain needs: pip install 'mslk-cuda>=1.0.0'"
    with pytest.raises(DeviceUnsupported, match="torchao/int4wo needs a CUDA GPU"):
        load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan("torchao/int4wo")))
    assert load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan("torchao/int8wo"))).specs


def test_a_package_counts_under_each_of_its_names(installed):
    (wanted,) = backends()["torchao"].scheme("fp8dq_int4wo").requires
    for names in ({"mslk_cuda": "1.1.0", "mslk": None}, {"mslk_cuda": None, "mslk": "1.1.0+cu130"}):
        installed(**names)
        assert missing((wanted,)) == []
    installed(mslk_cuda="0.0.1", mslk="0.0.0")
    assert missing((wanted,)) == [wanted]


@pytest.mark.parametrize(
    ("rocm", "message"), [(None, "capability 10.0 or newer; this one has 9.4"), ("7.0", "does not run")]
)
def test_only_cuda_s_numbers_are_compared(monkeypatch, rocm, message):
    monkeypatch.setattr(torch.version, "hip", rocm)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
    backend = backends()["torchao"]
    recipe = Recipe("nvfp4dq", {}, torch.bfloat16, torch.device("cuda"))
    with pytest.raises(DeviceUnsupported, match=message):
        ensure_runs(backend, backend.scheme("nvfp4dq"), recipe)
