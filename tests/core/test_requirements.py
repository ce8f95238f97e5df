"""Forgotten or outdated requirements: the command that installs them, at the start and at the run."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from quant_core import BackendUnavailable, why_not_installed

ROOT = Path(__file__).resolve().parents[2]
COMMAND = f'"{sys.executable}" -m pip install -r "{ROOT / "requirements.txt"}"'
VERSION = metadata.version


@pytest.fixture
def installed(monkeypatch):
    """Change what the metadata says: name -> version, or None for a package that is not there."""

    def change(**versions):
        def version(name):
            if (found := versions.get(name, "as it is")) is None:
                raise metadata.PackageNotFoundError(name)
            return VERSION(name) if found == "as it is" else found

        monkeypatch.setattr(metadata, "version", version)

    return change


def test_with_all_of_them_nothing_is_said():
    assert why_not_installed() == ""


@pytest.mark.parametrize(
    ("versions", "named"),
    [
        ({"diffusers": None}, "diffusers>=0.42"),
        ({"accelerate": None}, "accelerate>=1.13"),
        ({"diffusers": "0.30.0"}, "diffusers>=0.42 (0.30.0 is there)"),
        ({"gguf": None, "transformers": "4.57.1"}, "transformers>=5.0 (4.57.1 is there), gguf>=0.19"),
    ],
)
def test_what_is_missing_or_too_old_is_named_with_the_command(installed, versions, named):
    installed(**versions)
    assert (
        why_not_installed() == f"The pack's requirements are not installed: {named}. Run this and restart: {COMMAND}"
    )
    with pytest.raises(BackendUnavailable, match="The pack's requirements are not installed"):
        from quant_core.availability import import_diffusers

        import_diffusers.__wrapped__()


def test_all_forgotten_is_one_short_sentence(installed):
    names = [Requirement(line).name for line in (ROOT / "requirements.txt").read_text().split()]
    installed(**dict.fromkeys(names))
    said = why_not_installed()
    assert f"accelerate>=1.13, diffusers>=0.42, transformers>=5.0 and {len(names) - 3} more" in said
    assert len(said) - len(COMMAND) < 160


def test_comments_and_what_is_for_other_systems_are_passed_over(tmp_path, monkeypatch):
    file = tmp_path / "requirements.txt"
    file.write_text('# of a pipeline\n\ndiffusers>=9999 ; sys_platform == "no system"\naccelerate>=9999\n')
    monkeypatch.setattr("quant_core.requirements._FILE", file)
    assert "not installed: accelerate>=9999 (" in why_not_installed() and "diffusers" not in why_not_installed()


def test_a_backend_that_is_not_wanted_is_no_complaint(installed):
    installed(**dict.fromkeys(["bitsandbytes", "gguf", "optimum-quanto", "torchao"]))
    assert why_not_installed() == ""


def test_a_python_without_the_user_s_packages_installs_without_them():
    code = "from quant_core.requirements import _command; print(_command())"
    done = subprocess.run([sys.executable, "-s", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == COMMAND.replace('" -m', '" -s -m')


HIDDEN = """
import sys
from importlib import metadata
for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]: del sys.modules[name]
sys.modules["diffusers"] = None
version = metadata.version
def hide(name):
    if name == "diffusers": raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = hide
sys.argv = ["quant_core", *sys.argv[1:]]
from quant_core.__main__ import main
raise SystemExit(main())
"""


@pytest.mark.parametrize("command", [["estimate", "demo"], ["generate", "demo", "--prompt", "a", "--out", "x.png"]])
def test_the_command_line_says_so_too(tmp_path, command):
    done = subprocess.run([sys.executable, "-c", HIDDEN, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and COMMAND in done.stderr
