"""Saving that goes wrong loses nothing, leaves nothing, and holds nothing twice."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import (
    LoadRequest,
    SpecError,
    StoreError,
    find_folder,
    footprint,
    load_pipeline,
    parse_plan,
    save_pipeline,
    writing,
)

DEMO = find_folder("demo")
ROOT = Path(__file__).resolve().parents[2]


def load(source, plan="none", **settings):
    return load_pipeline(LoadRequest(str(source), parse_plan(plan), **settings))


@pytest.fixture(scope="module")
def pipeline():
    return load("demo", "transformer=torchao/int8wo,text_encoder=gguf/Q8_0,text_encoder_2=bitsandbytes_4bit/nf4")


def test_a_folder_that_is_there_stays_as_it_is(pipeline, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("keep")
    with pytest.raises(SpecError, match="mine is there already; name a folder that is not"):
        save_pipeline(pipeline, tmp_path / "mine")
    with pytest.raises(SpecError, match="absent is no folder; name a folder within one that is"):
        save_pipeline(pipeline, tmp_path / "absent/saved")
    assert (tmp_path / "mine/notes").read_text() == "keep" and [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_disk_that_fills_up_leaves_nothing(pipeline, tmp_path, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_tensors", full)
    (tmp_path / "saved.partial").mkdir()  # of someone else
    with pytest.raises(StoreError, match="saved cannot be written .*No space left on device"):
        save_pipeline(pipeline, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == [tmp_path / "saved.partial"]


def test_a_disk_without_room_is_told_before_anything_is_written(pipeline, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="takes .* MiB, and its disk has 1.00 MiB left"):
        save_pipeline(pipeline, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


class Cancelled(BaseException):
    pass


class BrokenConnection(OSError):
    """As a host's callback may raise it, which is no fault of a file."""


@pytest.mark.parametrize("error", [Cancelled, BrokenConnection, ValueError])
@pytest.mark.parametrize("at", [0.0, 0.01, 0.5, 0.9])
def test_a_save_that_is_cancelled_leaves_nothing(pipeline, tmp_path, at, error):
    def cancel(done, total, name):
        if done >= at * total:
            raise error("now")

    with pytest.raises(error) as raised:
        save_pipeline(pipeline, tmp_path / "saved", cancel)
    assert type(raised.value) is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["torchao/fp8wo", "gguf/Q8_0"])
@pytest.mark.parametrize("error", [Cancelled, BrokenConnection])
def test_a_load_that_is_cancelled_while_it_stores_is_not_gone_on_with(tmp_path, scheme, error):
    def cancel(done, total, name):
        if name == "transformer" and done > 0.5 * total:
            raise error("now")

    request = LoadRequest("demo", parse_plan(f"transformer={scheme}"), store=tmp_path / "store")
    with pytest.raises(error) as raised:
        load_pipeline(request, cancel)
    assert type(raised.value) is error
    assert {path.name for path in (tmp_path / "store").iterdir()} <= {".locks", ".digests"}


def test_a_save_that_is_killed_leaves_no_pipeline(tmp_path):
    """The folder has no model_index.json until all else is there."""
    code = """
import os, sys
from quant_core import LoadRequest, load_pipeline, parse_plan, save_pipeline

def kill(done, total, name):
    if done > float(sys.argv[2]) * total:
        os._exit(9)

save_pipeline(load_pipeline(LoadRequest("demo", parse_plan("transformer=torchao/int8wo"))), sys.argv[1], kill)
"""
    for share in ("0.1", "0.9"):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "saved", share], cwd=ROOT)
        assert done.returncode == 9 and not (tmp_path / "saved").exists()
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.name.startswith(".saved-") for path in tmp_path.iterdir())
    assert not list(tmp_path.rglob("model_index.json"))


def test_two_saves_of_one_name_do_not_meet(pipeline, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def save(_):
        try:
            return save_pipeline(pipeline, tmp_path / "saved")
        except (SpecError, StoreError) as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(save, range(2)))
    assert sum(isinstance(result, list) for result in results) == 1, results
    assert [path.name for path in tmp_path.iterdir()] == ["saved"] and load(tmp_path / "saved").models


def test_a_save_holds_a_tensor_at_a_time(tmp_path):
    """Neither the model again nor a file of it: torchao's own way would copy every tensor."""
    made = [0]

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            found = function(*arguments, **(named or {}))
            if isinstance(found, torch.Tensor) and "clone" in str(function):
                made[0] += found.numel() * found.element_size()
            return found

    pipeline = load("demo", "transformer=torchao/int8wo,text_encoder=torchao/fp8wo")
    with Counting():
        save_pipeline(pipeline, tmp_path / "saved")
    assert made[0] < 2**20 < footprint(pipeline.models["transformer"])


def test_progress_is_told_of_every_component_up_to_the_end(pipeline, tmp_path):
    told = []
    save_pipeline(pipeline, tmp_path / "saved", lambda *progress: told.append(progress))
    assert [name for name in dict.fromkeys(name for _, _, name in told)] == list(pipeline.models)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert 0.95 * told[-1][1] <= told[-1][0] <= told[-1][1]


def test_a_place_inside_the_model_is_refused(tmp_path):
    source = shutil.copytree(DEMO, tmp_path / "source")
    with pytest.raises(SpecError, match="is inside the model that it is made from"):
        save_pipeline(load(source), source / "inside")
