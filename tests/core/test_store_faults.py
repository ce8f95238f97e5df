"""A store that was damaged, whose writers were killed, or that two processes fill at once."""

import gc
import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from quant_core import generate
from quant_core.container import record
from quant_core.errors import DamagedEntry
from quant_core.manifest import Key, _sealed
from quant_core.store import Store

from .test_store import REQUEST, kinds, load

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "manifest.json"
LIMIT = 2**40


def rewrite(entry, change, seal=_sealed):
    """Change a manifest, which keeps its form, and the seal with it."""
    data = json.loads((entry / MANIFEST).read_text())
    change(data)
    (entry / MANIFEST).write_text(json.dumps(seal(data), indent=1, sort_keys=True) + "\n")


def weights(entry):
    return next(entry.glob("weights*"))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def named(entry, name, file):
    rewrite(entry, lambda data: data["files"].update({name: record(file)._asdict()}))


def link(entry, other, outside):
    """Only a link, and no name, leads out of the entry."""
    file = weights(entry)
    shutil.move(file, outside)
    file.symlink_to(outside)


def leave(entry, other, outside):
    shutil.copy(outside, entry.parent)
    named(entry, f"../{outside.name}", outside)


def swap_files(entry, other, outside):
    one, two = weights(entry), weights(other)
    for source, target in ((one, outside.with_name("swap")), (two, one), (outside.with_name("swap"), two)):
        os.replace(source, target)


def swap_folders(entry, other, outside):
    for source, target in ((entry, outside.with_name("swap")), (other, entry), (outside.with_name("swap"), other)):
        os.replace(source, target)


DAMAGE = {
    "a bit of the weights": lambda entry, *_: flip(weights(entry), -1000),
    "a bit of the last weight": lambda entry, *_: flip(weights(entry), -1),
    "a bit of the header": lambda entry, *_: flip(weights(entry), 40),
    "a bit of the header's size": lambda entry, *_: flip(weights(entry), 6),
    "a bit of the manifest": lambda entry, *_: flip(entry / MANIFEST, 3),
    "cut short": lambda entry, *_: os.truncate(weights(entry), weights(entry).stat().st_size - 1),
    "cut in half": lambda entry, *_: os.truncate(weights(entry), weights(entry).stat().st_size // 2),
    "longer": lambda entry, *_: weights(entry).write_bytes(weights(entry).read_bytes() + b"\0"),
    "empty": lambda entry, *_: os.truncate(weights(entry), 0),
    "without its weights": lambda entry, *_: weights(entry).unlink(),
    "with another entry's weights": swap_files,
    "another entry": swap_folders,
    "a file outside of the entry": leave,
    "a link out of the entry": link,
    "a file that is no weights": lambda entry, _, outside: named(entry, MANIFEST, outside),
    "without files": lambda entry, *_: rewrite(entry, lambda data: data["files"].clear()),
    "a manifest that was changed": lambda entry, *_: rewrite(
        entry, lambda data: data.update(what="another"), seal=lambda data: data
    ),
    "another format": lambda entry, *_: rewrite(entry, lambda data: data.update(format=99)),
    "another key": lambda entry, *_: rewrite(entry, lambda data: data["key"].update(foreign=1)),
    "a foreign field of a file": lambda entry, *_: rewrite(
        entry, lambda data: next(iter(data["files"].values())).update(foreign=1)
    ),
    "a size that is a word": lambda entry, *_: rewrite(
        entry, lambda data: next(iter(data["files"].values())).update(bytes="many")
    ),
    "without format": lambda entry, *_: rewrite(entry, lambda data: data.pop("format")),
    "without key": lambda entry, *_: rewrite(entry, lambda data: data.pop("key")),
    "a key that is a word": lambda entry, *_: rewrite(entry, lambda data: data.update(key="word")),
    "an empty manifest": lambda entry, *_: os.truncate(entry / MANIFEST, 0),
    "a manifest that is no text": lambda entry, *_: (entry / MANIFEST).write_bytes(bytes(range(256))),
    "a manifest that is a list": lambda entry, *_: (entry / MANIFEST).write_text("[]\n"),
    "a manifest that is deep": lambda entry, *_: (entry / MANIFEST).write_text("[" * 100_000),
    "no manifest": lambda entry, *_: (entry / MANIFEST).unlink(),
}


def fill(tiny, folder, *plans):
    """A store with an entry of each plan; and the picture of the first."""
    image = generate(load(tiny("sd3"), folder, plans[0]), REQUEST)
    for plan in plans[1:]:
        load(tiny("sd3"), folder, plan)
    gc.collect()
    return folder, image


@pytest.fixture(scope="module")
def filled(tiny, tmp_path_factory):
    """Two entries of the same size, and a picture."""
    plans = (f"transformer=bitsandbytes_4bit/{scheme}" for scheme in ("nf4", "fp4"))
    return fill(tiny, tmp_path_factory.mktemp("store") / "filled", *plans)


@pytest.fixture(scope="module")
def filled_gguf(tiny, tmp_path_factory):
    """The same of GGUF, of two sizes."""
    plans = (f"transformer=gguf/{scheme}" for scheme in ("Q8_0", "Q4_0"))
    return fill(tiny, tmp_path_factory.mktemp("store") / "filled", *plans)


@pytest.mark.parametrize("kind", ["bitsandbytes_4bit/nf4 fp4", "gguf/Q8_0 Q4_0"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_set_aside_and_made_again(tiny, request, tmp_path, caplog, damage, kind):
    filled = request.getfixturevalue("filled_gguf" if kind.startswith("gguf") else "filled")
    store = tmp_path / "store"
    shutil.copytree(filled[0], store, symlinks=True)
    scheme, second = kind.split()
    plan = f"transformer={scheme}"
    (entry,), (other,) = store.glob(f"*-{scheme.partition('/')[2]}-*"), store.glob(f"*-{second}-*")
    outside = tmp_path / f"outside{weights(entry).suffix}"
    shutil.copy(weights(entry), outside)
    DAMAGE[damage](entry, other, outside)
    before = outside.read_bytes(), outside.stat().st_mtime_ns
    assert Store(store).verify()[entry.name], "verify sees it"
    Store(store, LIMIT).prune(LIMIT)
    pipeline = load(tiny("sd3"), store, plan)
    assert torch.equal(generate(pipeline, REQUEST), filled[1])
    assert kinds(pipeline) == ["stored"]
    assert len([line for line in caplog.messages if "set aside" in line and entry.name in line]) == 1
    assert entry.with_name(f"{entry.name}.damaged").is_dir()
    assert (outside.read_bytes(), outside.stat().st_mtime_ns) == before
    caplog.clear()
    again = load(tiny("sd3"), store, plan)
    assert kinds(again) == ["store"] and torch.equal(generate(again, REQUEST), filled[1])
    assert not [line for line in caplog.messages if "set aside" in line]
    Store(store).prune()
    assert (outside.read_bytes(), outside.stat().st_mtime_ns) == before


def test_any_flipped_bit_of_a_manifest_is_noticed_or_changes_nothing(filled, tmp_path, caplog):
    """What an entry is of and the checksums of its files are the same, or it is set aside."""
    caplog.set_level(logging.ERROR)
    shutil.copytree(filled[0], tmp_path / "store")
    (entry,) = (tmp_path / "store").glob("*-nf4-*")
    manifest = entry / MANIFEST
    text, store = manifest.read_bytes(), Store(tmp_path / "store")
    kept = json.loads(text)
    key = Key(entry.name.rpartition("-")[0], kept["key"], {})
    rng, raised = random.Random(0), []
    for place in range(len(text)):
        flipped = bytearray(text)
        flipped[place] ^= 1 << rng.randrange(8)
        manifest.write_bytes(flipped)
        try:
            found = store.find(key)
            store.entries()
            store.verify()
        except DamagedEntry:
            continue
        except Exception as error:
            raised.append(f"{type(error).__name__} at {flipped[place - 8 : place + 8]!r}")
            continue
        found.hold.close()
        assert [found.manifest[part] for part in ("key", "files")] == [kept["key"], kept["files"]]
    assert raised == []


def digest(pipeline):
    return hashlib.sha256(generate(pipeline, REQUEST).numpy().tobytes()).hexdigest()


def forked(source, store, ready=None, answer=None):
    """A process that loads the plan, and its id."""
    child = os.fork()
    if child:
        return child
    try:
        if ready:
            ready.wait()
        pipeline = load(source, store)
        if answer:
            answer.put((kinds(pipeline), digest(pipeline)))
            answer.close()
            answer.join_thread()
        os._exit(0)
    finally:
        os._exit(1)


def in_a_process(function, *arguments):
    """Call one of this file's functions in a process of one thread, which may fork; what it prints."""
    code = f"import sys; from tests.core.test_store_faults import {function} as call; call(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def kill_writers(source, folder, count):
    torch.set_num_threads(1)
    folder, rng = Path(folder), random.Random(0)
    expected, found, left = digest(load(source, "off")), [], 0
    load(source, folder)
    (made,) = Store(folder).entries()
    for number in range(int(count)):
        gc.collect()
        shutil.rmtree(folder)
        child = forked(source, folder)
        while not list(folder.glob("*.partial")) and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, made.manifest["seconds"]) if number % 3 else 0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left += bool(list(folder.glob("*.partial")))
        if number % 2:
            Store(folder).prune(LIMIT)
            found += [path.name for path in folder.glob("*.partial")]
        pipeline = load(source, folder)
        found += [kind for kind in kinds(pipeline) if kind not in ("store", "stored")]
        found += ["another picture"] * (digest(pipeline) != expected)
        del pipeline
        found += [path.name for path in folder.glob("*.partial")]
        found += [wrong for wrong in Store(folder).verify().values() if wrong]
        found += ["another entry"] * ([entry.folder for entry in Store(folder).entries()] != [made.folder])
    print(json.dumps({"wrong": found, "left": left}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_nothing_that_matters(tiny, tmp_path):
    count = int(os.environ.get("QDIFF_KILLS", "20"))
    found = in_a_process("kill_writers", tiny("sd3"), tmp_path / "store", count)
    assert found["wrong"] == []
    assert found["left"] > 0, "some were killed while they wrote"


def race(source, folder, rounds):
    torch.set_num_threads(1)
    folder, expected = Path(folder), digest(load(source, "off"))
    context, wrong = multiprocessing.get_context("fork"), []
    for _ in range(int(rounds)):
        shutil.rmtree(folder, ignore_errors=True)
        ready, answer = context.Barrier(2), context.Queue()
        children = [forked(source, folder, ready, answer) for _ in range(2)]
        answers = sorted(answer.get(timeout=60) for _ in children)
        for child in children:
            os.waitpid(child, 0)
        if answers != [(["store"], expected), (["stored"], expected)]:
            wrong.append(f"{answers}")
        names = sorted(path.name for path in folder.iterdir() if path.name != ".digests")
        if names != [".locks", *(entry.folder.name for entry in Store(folder).entries())] or len(names) != 2:
            wrong.append(f"{names}")
    print(json.dumps(wrong))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_at_once_make_one_entry(tiny, tmp_path):
    assert in_a_process("race", tiny("sd3"), tmp_path / "store", 3) == []
