"""The table of speed and memory: both sides of a row, a run that was cut off, what fails, and the targets."""

import json
import subprocess
from dataclasses import asdict

import gpu
import pytest
import speed_run
from speed_report import page
from speed_rows import COMPILES, EAGER_NF4, GUIDE, QUICK, Row, rows, why_not
from speed_targets import failures, verdicts

from quant_core import parse_optimization
from quant_core.compiling import is_recording

FILE = "gpu-tiny-cpu.json"
PAIR = [Row("diffusers", "int8wo", "eager", "resident"), Row("ours", "int8wo", "eager", "budget")]
FIGURES = {
    "load": 2.0,
    "first": 3.0,
    "steps": [0.5, 0.5, 0.5],
    "peak": dict.fromkeys(("load", "first", "later"), {"allocated": 2**30, "reserved": 2**31}),
}


def go(folder, *more):
    return gpu.main(
        ["--device", "cpu", "--scale", "tiny", "--work", str(folder / "work"), "--out", str(folder), *more]
    )


def figures(seconds, size):
    """What a row of these seconds and bytes came to."""
    most = {"allocated": size, "reserved": size}
    return FIGURES | {"seconds": [seconds] * 3, "peak": {"load": most, "first": most, "later": most}}


def results(**found):
    """Results by the words of a row with a dash between them, and all that else is in a file."""
    settings = {"scale": "tiny", "device": "cuda", "size": 64, "steps": 3, "tokens": 32, "images": 3}
    return {"settings": settings, "machine": "a machine", "rows": found}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two rows, measured in this process."""
    folder, patch = tmp_path_factory.mktemp("speed"), pytest.MonkeyPatch()

    def ask(command, task, *row, seconds=None):
        return speed_run.main(command, json.dumps(asdict(task)), *row)

    patch.setattr(gpu, "ask", ask)
    patch.setattr(gpu, "rows", lambda quick: PAIR)
    code = go(folder, "--check")
    patch.undo()
    return code, folder


def test_both_sides_of_a_row_are_measured(real):
    code, folder = real
    assert code == 0
    found = json.loads((folder / FILE).read_text())
    assert list(found["rows"]) == [str(row) for row in PAIR]
    for row in found["rows"].values():
        assert len(row["seconds"]) == len(row["steps"]) == 3
        assert all(0 < step < seconds for step, seconds in zip(row["steps"], row["seconds"], strict=True))
        assert row["load"] > 0 and row["first"] > 0
        assert all(most["allocated"] > 2**27 for most in row["peak"].values())  # with the libraries
    assert found["rows"][str(PAIR[1])]["origins"] == {"transformer": "stored"}


def test_the_page_is_made_of_the_results_and_the_store_is_gone(real):
    _, folder = real
    found = json.loads((folder / FILE).read_text())
    text = (folder / FILE).with_suffix(".md").read_text(encoding="utf-8")
    assert text == page(found, verdicts(found, PAIR))
    assert "| int8wo | resident | eager |" in text and "| int8wo | budget | eager |" in text
    assert not (folder / "work/store").exists() and (folder / "work/tiny/model_index.json").is_file()


@pytest.fixture
def asked(monkeypatch):
    """Instead of running: figures, but for schemes in its `failing`. Holds the rows that were asked for."""

    class Asked(list):
        failing: dict = {}

        def __call__(self, command, task, *row, seconds=None):
            if command != "measure":
                return {"name": "cpu", "machine": "a machine"}
            self.append(Row(*row))
            found = self.failing.get(row[1], figures(1.0, 2**30))
            if isinstance(found, BaseException):
                raise found
            return found

    made = Asked()
    monkeypatch.setattr(gpu, "ask", made)
    return made


def test_a_run_that_was_cut_off_goes_on(asked, tmp_path):
    asked.failing = {"int8dq": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, "--quick")
    assert asked == list(QUICK[:4])
    asked.clear()
    asked.failing = {}
    assert go(tmp_path, "--quick") == 0
    assert asked == list(QUICK[3:])
    asked.clear()
    assert go(tmp_path, "--quick") == 0 and asked == []
    assert go(tmp_path, "--quick", "--again", "--only", "ours") == 0 and [row.side for row in asked] == ["ours"] * 2


def test_it_stops_before_its_minutes_are_over(asked, tmp_path, capsys):
    asked.failing = {"int8dq": subprocess.TimeoutExpired("a row", 1)}
    assert go(tmp_path, "--quick", "--minutes", "1") == 0
    assert "2 rows are left" in capsys.readouterr().out
    assert list(json.loads((tmp_path / FILE).read_text())["rows"]) == [str(row) for row in QUICK[:3]]
    asked.clear()
    go(tmp_path, "--quick", "--minutes", "0")
    assert asked == []


def test_what_fails_is_a_sentence_and_the_rest_goes_on(asked, tmp_path, capsys):
    asked.failing = {"int8dq": {"error": "OutOfMemoryError: too much.", "refused": False}}
    assert go(tmp_path, "--quick") == 0 and asked == list(QUICK)
    assert go(tmp_path, "--quick", "--check") == 1
    text = capsys.readouterr().out
    assert "- ours, int8dq, blocks, resident: OutOfMemoryError: too much." in text and "failed, see below" in text
    asked.failing = {"int8dq": {"error": "DeviceUnsupported: not here.", "refused": True}}
    assert go(tmp_path, "--quick", "--check", "--again", "--only", "int8dq") == 0
    assert "refused, see below" in (tmp_path / FILE).with_suffix(".md").read_text(encoding="utf-8")


def test_results_of_other_settings_are_not_mixed(asked, tmp_path):
    go(tmp_path, "--quick")
    with pytest.raises(SystemExit, match="has steps 3, not 4"):
        go(tmp_path, "--quick", "--steps", "4")
    with pytest.raises(SystemExit):
        go(tmp_path, "--only", "no such row")


def test_every_row_is_there_once_and_on_both_sides():
    every = rows(quick=False)
    assert len(set(every)) == len(every) and set(QUICK) <= set(every)
    assert [row for row in every[:6] if row.side == "diffusers"] == list(GUIDE)
    for row in every:
        assert row.compile == "tuned" or row._replace(side="ours") in every
    assert "GGUF" in why_not(Row("diffusers", "Q8_0", "eager", "resident"), "cuda")
    assert "compiled" in why_not(Row("ours", "int8dq", "eager", "resident"), "cuda")
    assert why_not(Row("ours", "int8dq", "eager", "resident"), "cpu") is None
    assert all(why_not(row, "cuda") is None for row in QUICK)
    assert "scales on the CPU" in why_not(Row("diffusers", "nf4", "eager", "budget"), "cuda")
    assert why_not(Row("ours", "nf4", "eager", "budget"), "cuda") is None


def test_no_row_of_ours_records_graphs_of_memory_that_comes_and_goes():
    asked = [parse_optimization(compile=way.ours).compile for way in COMPILES.values()]
    assert [setting for setting in asked if setting and is_recording(setting)] == []


OURS = Row("ours", "nf4", "blocks", "offloaded")


@pytest.mark.parametrize(("seconds", "size", "met"), [(7.9, 82, True), (8.0, 82, False), (7.9, 83, False)])
def test_seconds_and_memory_must_be_met_by_one_row(seconds, size, met):
    rows = [EAGER_NF4, OURS, OURS._replace(memory="resident")]
    found = [figures(10.0, 100), figures(seconds, size), figures(1.0, 100)]
    told = verdicts(results(**{str(row): one for row, one in zip(rows, found, strict=True)}), rows)
    assert told[0].met is met
    assert told[1].met is True  # 1.0 of 10.0
    assert told[2].met is None


def test_a_target_without_figures_is_missed_and_one_not_asked_for_is_not_told():
    found = results(**{str(EAGER_NF4): figures(10.0, 100), str(OURS): {"error": "it broke.", "refused": False}})
    assert [verdict.met for verdict in verdicts(found, [EAGER_NF4, OURS])] == [False, False, None]
    assert [verdict.met for verdict in verdicts(found, [EAGER_NF4])] == [None, None, None]
    assert list(failures(found)) == [f"{OURS} failed: it broke."]


@pytest.mark.parametrize(("seconds", "met"), [(1.15, True), (1.16, False)])
def test_a_budget_is_compared_with_the_same_row_without_one(seconds, met):
    budget, whole = OURS._replace(memory="budget"), OURS._replace(memory="resident")
    found = results(**{str(budget): figures(seconds, 1), str(whole): figures(1.0, 1)})
    assert verdicts(found, [budget, whole])[2].met is met


def test_a_row_that_was_not_compiled_though_asked_is_a_failure():
    found = results(**{str(OURS): figures(1.0, 1) | {"reports": {"compile": {"eager": "no compiler"}}}})
    assert list(failures(found)) == [f"{OURS} was not compiled: no compiler"]


def test_a_process_that_dies_is_an_error_and_one_that_takes_too_long_is_ended(tmp_path):
    task = speed_run.Task("tiny", "cpu", str(tmp_path / "tiny"), str(tmp_path / "store"), 64, 3, 32, 3)
    assert "there is no 'nothing'" in gpu.ask("nothing", task)["error"]
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.ask("measure", task, *EAGER_NF4, seconds=0.1)
    assert list(tmp_path.iterdir()) == []
