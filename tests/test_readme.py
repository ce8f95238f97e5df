"""What the README says of the code is what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quant_core import format_plan, parse_plan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_backend_table_is_the_registry_s():
    command = [sys.executable, "-m", "quant_core", "backends", "--markdown"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    (found,) = re.findall(r"<!-- backends -->\n(.*?)\n<!-- /backends -->", README, re.S)
    assert found == table


@pytest.mark.parametrize("text", re.findall(r"^\| `([a-z_]+[/=][^`]*)` \|", README, re.M))
def test_a_plan_in_the_readme_can_be_read(text):
    plan = parse_plan(text.replace("\\|", "|"))
    assert parse_plan(format_plan(plan)) == plan


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!https?:)[^)#]+)\)", README))
def test_what_the_readme_links_to_is_there(path):
    assert (ROOT / path).is_file()
