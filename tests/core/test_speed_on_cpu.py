"""The figures of a CPU: both kinds of calls make the same picture, and what misses a target is said."""

import copy

import cpu
import cpu_run
import pytest
import torch

RUN = {"run": "first run", "graphs": 2, "compiled": 2, "seconds": 9.0, "eager": ""}
GOOD = {
    "overhead, eager": {"diffusers": [1.0, 2.0, 3.0], "ours": [1.01, 2.02, 9.0], "difference": 0.0},
    "overhead, compiled": {"diffusers": [1.0], "ours": [0.9], "difference": 0.01},
    "graphs, first process": [RUN, RUN | {"run": "new seed", "graphs": 0, "compiled": 0}],
    "graphs, second process": [RUN | {"compiled": 0}],
    "caches": {"off": {"seconds": [2.0]}, "mag": {"seconds": [1.0], "cache": {"reused": 3, "passes": 12}}},
    "memory, diffusers, none": {"peak": 100 * 2**20, "own": 50 * 2**20},
    "memory, ours, none": {"peak": 102 * 2**20, "own": 50 * 2**20},
}


def test_good_figures_miss_no_target_and_are_in_the_table():
    assert list(cpu.missed(GOOD)) == []
    text = "\n".join(cpu.report(GOOD))
    assert "| overhead, eager | 2.000 | 2.020 | 1.010 | 0.0000 |" in text
    assert "| new seed | first process | 0 | 0 | 9.00 |" in text
    assert "| mag | 3 | 12 | 0.500 |" in text
    assert "| ours, none | 102 | 50 | 1.020 |" in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"overhead, eager": {"ours": [1.03, 2.06, 3.09]}}, "overhead, eager is 1.030 of diffusers"),
        ({"overhead, eager": {"difference": 0.5}}, "overhead, eager: the pictures differ by 0.5000"),
        ({"memory, ours, none": {"peak": 103 * 2**20}}, "peak memory in 16 bit is 1.030 of diffusers"),
        ({"caches": {"error": "it broke"}}, "caches failed: it broke"),
    ],
)
def test_what_misses_a_target_is_said(change, told):
    found = copy.deepcopy(GOOD)
    for name, values in change.items():
        found[name].update(values)
    (line,) = cpu.missed(found)
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("process", "run", "told"),
    [
        ("first", RUN | {"run": "new prompt"}, "new prompt traces 2 graphs"),
        ("second", RUN, "first run makes code for 2 graphs"),
        ("first", RUN | {"eager": "no compiler"}, "first run is not compiled: no compiler"),
    ],
)
def test_a_run_that_is_compiled_anew_is_said(process, run, told):
    (line,) = cpu.missed(GOOD | {f"graphs, {process} process": [run]})
    assert told in line


def test_bare_and_ours_make_the_same_picture(tmp_path):
    from flux_shapes import write_random

    write_random("tiny", tmp_path / "tiny", "cpu")
    found = cpu_run.overhead(tmp_path / "tiny", tmp_path / "store", 64, 2, 2, "off")
    assert found["difference"] == 0 and len(found["diffusers"]) == len(found["ours"]) == 2
    with torch.no_grad():
        one = cpu_run.paint_plain(cpu_run.plain(tmp_path / "tiny", "none", compiled=False), 0, 64, 2)
    assert one.shape == (1, 64, 64, 3) and one.isfinite().all()
