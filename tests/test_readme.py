"""What the README says of the code is what the code says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from quality import page
from quality_report import chart_points, readme_block

from quant_core import format_plan, parse_plan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

QUALITY = ROOT / "benchmarks/results/quality-demo.json"


def test_the_backend_table_is_the_registry_s():
    command = [sys.executable, "-m", "quant_core", "backends", "--markdown"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    (found,) = re.findall(r"<!-- backends -->\n(.*?)\n<!-- /backends -->", README, re.S)
    assert found == table


@pytest.mark.parametrize("text", re.findall(r"^\| `([a-z_]+[/=][^`]*)` \|", README, re.M))
def test_a_plan_in_the_readme_can_be_read(text):
    plan = parse_plan(text.replace("\\|", "|"))
    assert parse_plan(format_plan(plan)) == plan


@pytest.mark.parametrize("path", re.findall(r"`((?:benchmarks|example_workflows|quant_core|tests)/[\w./-]+)`", README))
def test_what_the_readme_names_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!https?:)[^)#]+)\)", README))
def test_what_the_readme_links_to_is_there(path):
    assert (ROOT / path).is_file()


def test_the_quality_table_summary_and_chart_are_of_the_results():
    results = json.loads(QUALITY.read_text(encoding="utf-8"))
    assert QUALITY.with_suffix(".md").read_text(encoding="utf-8") == page(results)
    (found,) = re.findall(r"<!-- quality -->\n(.*?)\n<!-- /quality -->", README, re.S)
    assert found == readme_block(results)
    with Image.open(ROOT / "docs/pictures/quality.png") as picture:
        assert [tuple(point) for point in json.loads(picture.text["figures"])] == chart_points(results)


@pytest.mark.parametrize("script", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.name)
def test_a_benchmark_can_be_quick_and_checked(script):
    text = script.read_text(encoding="utf-8")
    if "add_argument(" in text:  # the others are parts of one
        assert '"--quick"' in text and '"--check"' in text
