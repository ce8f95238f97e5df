"""The figures of compiled against eager: what misses a target is said, and results are kept by plan."""

import copy

import compiled
import compiled_run
import pytest
import torch

RUN = {"run": "first run", "seconds": 9.0, "graphs": 2, "compiled": 2, "eager": ""}
RUNS = [RUN, RUN | {"run": "new seed", "graphs": 0, "compiled": 0}, RUN | {"run": "new size", "compiled": 1}]


def row(between, eager, made, plan_runs=RUNS):
    found = dict(zip(compiled.DISTANCES, (between, eager, made), strict=True))
    seconds = {"psnr": 48.5, "eager": 0.4, "compiled": 0.3}
    return {"distance": found, "other distance": found, "runs": plan_runs} | seconds


GOOD = {
    "none": row(0.01, 0.0, 0.01),
    "gguf/Q8_0": row(0.0124, 0.02, 0.02),
    "torchao/int8dq": row(0.0249, 0.02, 0.0209),
}


def test_good_figures_miss_no_target_and_are_in_the_table():
    assert list(compiled.missed(GOOD)) == []
    text = "\n".join(compiled.report(GOOD))
    assert "| gguf/Q8_0 | 0.0124 | 0.0200 | 0.0200 | 0.0124 | 48.5 |" in text
    assert "| graphs | first run | new seed | new size |" in text and "| none | 2 | 0 | 2, code for 1 |" in text
    assert "| none | 9.0 | 0.400 | 0.300 | 0.75 |" in text


@pytest.mark.parametrize(
    ("plan", "figures", "told"),
    [
        ("gguf/Q8_0", row(0.0126, 0.02, 0.02), "compiled is 1.26 times as far from eager as in 16 bit, at most 1.25"),
        ("torchao/int8dq", row(0.0251, 0.02, 0.02), "compiled is 2.51 times as far from eager as in 16 bit"),
        ("gguf/Q8_0", row(0.01, 0.02, 0.0211), "compiled is 1.055 times as far from 16 bit as eager"),
    ],
)
def test_a_distance_that_misses_a_target_is_said_of_both_sizes(plan, figures, told):
    lines = list(compiled.missed(GOOD | {plan: figures}))
    assert len(lines) == 2 and all(line.startswith(f"{plan}: {told}") for line in lines)
    assert ["another size" in line for line in lines] == [False, True]


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (RUN | {"run": "new prompt", "graphs": 1}, "none: new prompt traces 1 graphs, at most 0"),
        (RUN | {"run": "new size", "graphs": 3}, "none: new size traces 3 graphs, at most 2"),
        (RUN | {"run": "new size", "eager": "no compiler"}, "none: new size is not compiled: no compiler"),
    ],
)
def test_a_run_that_misses_a_target_is_said(run, told):
    assert list(compiled.missed({"none": row(0.01, 0.0, 0.01, [RUN, run])})) == [told]


def test_what_failed_or_has_nothing_to_be_compared_with_is_said():
    rows = copy.deepcopy(GOOD)
    rows["none"] = {"error": "it broke"}
    failed, *others = compiled.missed(rows)
    assert failed == "none failed: it broke"
    assert len(others) == 4 and all("no figures of 16 bit to compare with" in line for line in others)
    assert "none" not in "\n".join(compiled.report(rows))


def test_results_are_kept_by_plan_for_the_machine_they_are_of(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "RESULTS", tmp_path / "compiled-demo.json")
    monkeypatch.setattr(compiled, "machine", lambda: "a machine")
    assert compiled.read() == {}
    compiled.write(dict(reversed(GOOD.items())))
    assert compiled.read() == GOOD and list(compiled.read()) == ["none", "torchao/int8dq", "gguf/Q8_0"]
    assert "All targets are met." in (tmp_path / "compiled-demo.md").read_text(encoding="utf-8")
    monkeypatch.setattr(compiled, "machine", lambda: "another machine")
    assert compiled.read() == {}


def test_the_distance_is_relative_to_the_others():
    ones, threes = [torch.ones(2), torch.ones(1)], [torch.full((2,), 3.0), torch.full((1,), 3.0)]
    assert compiled_run.distance(threes, ones) == 2.0
    assert compiled_run.distance(ones, ones) == 0.0
