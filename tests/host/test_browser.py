"""What a user sees of the nodes in a real browser, in both of ComfyUI's renderers: pytest -m host"""

import json
import time

import pytest

from .browser import CHROMIUM, Page
from .conftest import COMFYUI, PYTHON, ROOT, start

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not (COMFYUI / "main.py").is_file() or not PYTHON.exists(), reason="no ComfyUI"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium"),
]

SHOWN = """(type) => {
  const node = app.graph.nodes.find((node) => node.type === type);
  const element = node.widgets.find(({ name }) => name === "result")?.element;
  const inNode = document.querySelector(`[data-node-id="${node.id}"] .qdiff-result`) ?? element;
  return element?.isConnected && inNode === element && element.clientHeight > 20 ? element.innerText : null;
}"""
SET = """(type, name, value) => {
  app.graph.nodes.find((node) => node.type === type).widgets.find((widget) => widget.name === name).value = value;
}"""
CHANGE = """() => {
  app.graph.nodes[0].pos = [0, 900];
  app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState();
}"""
TAB = """() => [...document.querySelectorAll("span, div, button")]
  .filter(({ textContent }) => textContent.trim() === "first").at(-1)"""
WIDTHS = """() => [...document.querySelectorAll(".qdiff-result")]
  .map(({ scrollWidth, clientWidth }) => [scrollWidth, clientWidth]).filter(([all, seen]) => all > seen)"""
MODERN_FIELD = """() => {
  const { value } = app.graph.getNodeById(1).widgets.find(({ name }) => name === "budget");
  return [...document.querySelectorAll("[data-node-id='1'] input")].find((input) => input.value === value);
}"""
CLASSIC_FIELD = """() => {
  const [node, { offset, scale }] = [app.graph.getNodeById(1), app.canvas.ds];
  const { left, top } = app.canvas.canvas.getBoundingClientRect();
  const y = node.pos[1] + node.widgets.find(({ name }) => name === "budget").last_y + 10;
  return [left + (node.pos[0] + node.size[0] - 60 + offset[0]) * scale, top + (y + offset[1]) * scale];
}"""
TABLE = "plan        PSNR dB\n----------  -------\ngguf/Q4_0   38.7\n" + "a sentence longer than its node is wide " * 5


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With the pack in a folder without blanks in its name, where ComfyUI serves no scripts."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes/quantized-diffusers").symlink_to(ROOT)
    host, process = start(folder)
    yield host
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "Nodes 2.0"])
def page(server, request, tmp_path_factory):
    page = Page(server, tmp_path_factory.mktemp("chromium"), request.param)
    page.modern = request.param
    yield page
    page.close()


def workflow(name):
    return json.loads((ROOT / "example_workflows" / f"{name}.json").read_text())


def small(page):
    for name, value in {"width": 32, "height": 32, "steps": 1, "extra": ""}.items():
        page(SET, "QDiff_Generate", name, value)


def test_a_budget_holds_what_is_typed(page):
    page.load(workflow("demo_auto_plan"), "budget")
    budget = "async () => (await app.graphToPrompt()).output['1'].inputs.budget"
    assert page(budget) == "15MiB"
    for typed in ("0.012", "7.75", "12.25", "0.0146"):
        field(page)
        page.write(typed)
        page.press("Enter")
        assert page(budget) == typed
    for key in ("Tab", "Enter"):
        field(page, select=False)
        page.press(key)
        page.press("Escape")
        assert page(budget) == "0.0146"


def field(page, select=True):
    """Click into the field of the budget. A click may only close what was open; a dialog may lack the focus."""

    def focused():
        if not page("() => document.querySelector('.graphdialog input')?.focus() ?? document.activeElement.value"):
            page.click_on(MODERN_FIELD) if page.modern else page.click(*page(CLASSIC_FIELD))
        return page("() => document.activeElement.tagName === 'INPUT'")

    page.until(focused)
    if select:
        page("() => document.activeElement.select()")


def test_every_node_that_ends_a_workflow_shows_its_text(page):
    page.load({"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}}, "empty")
    types = page("() => Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith('QDiff_'))")
    assert len(types) == 10
    page("(types) => types.forEach((type) => app.graph.add(LiteGraph.createNode(type)))", types)
    time.sleep(2)
    always = [type for type in types if page(SHOWN, type)]
    names = ("InspectQuant", "SavePipeline", "CompareQuant", "Sensitivity", "AutoPlan")
    assert always == [f"QDiff_{name}" for name in names]
    page("(text) => app.graph.nodes.forEach((node) => node.onExecuted({ text: [text] }))", TABLE)
    time.sleep(2)
    for type in types:
        assert page(SHOWN, type).split("\n")[:3] == TABLE.split("\n")[:3], type
    assert page(WIDTHS) == [], "all that is wider than its node is wrapped"


def test_a_text_comes_with_a_run_comes_back_and_goes_with_the_next(page):
    page.load(workflow("demo_default"), "first")
    small(page)
    page(SET, "QDiff_Generate", "prompt", "a lake " * 600)
    assert page(SHOWN, "QDiff_Generate") is None and page.run() == "execution_success"
    told = page(SHOWN, "QDiff_Generate")
    assert "reads 77 of 1202 tokens of the prompt" in told and "component" in page(SHOWN, "QDiff_InspectQuant")
    page.load(workflow("demo_compare"), "second")
    page.click_on(TAB)
    time.sleep(2)
    page(CHANGE)
    page("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    time.sleep(2)
    assert page(SHOWN, "QDiff_Generate") == told and "component" in page(SHOWN, "QDiff_InspectQuant")
    page(SET, "QDiff_Generate", "prompt", "a lake")
    assert page.run() == "execution_success" and page(SHOWN, "QDiff_Generate") is None


def test_what_is_wrong_stands_on_its_node_until_it_is_mended(page):
    page.load(json.loads(json.dumps(workflow("demo_default")).replace('"demo"', '"no/such"')), "wrong")
    small(page)
    assert page.run() == "refused"
    assert page(SHOWN, "QDiff_LoadPipeline").startswith(
        "There is no diffusers pipeline 'no/such' under models/diffusers"
    )
    page(SET, "QDiff_LoadPipeline", "pipeline", "demo")
    page(SET, "QDiff_QuantConfig", "skip_modules", "proj_outt")
    assert page.run() == "execution_error"
    assert page(SHOWN, "QDiff_LoadPipeline").startswith("Skip pattern 'proj_outt' matches no module")
    page(SET, "QDiff_QuantConfig", "skip_modules", "")
    assert page.run() == "execution_success"
    assert page(SHOWN, "QDiff_LoadPipeline") is None
