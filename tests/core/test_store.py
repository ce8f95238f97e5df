"""Quantized components that were stored are what they were: the bits, the reports, and when they are made anew."""

import errno
import gc
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from quant_core import (
    GenerateRequest,
    LoadRequest,
    digests,
    footprint,
    generate,
    inspect_pipeline,
    load_pipeline,
    parse_plan,
    quantizing,
)
from quant_core import report_data as as_data
from quant_core.availability import quiet_libraries
from quant_core.checkpoint import weight_files
from quant_core.container import record, write_tensors
from quant_core.packed import all_tensors
from quant_core.reading import cast, read_mapped, read_weights
from quant_core.source import read_index
from quant_core.store import Store

from .tiny_pipelines import BUILDERS

REQUEST = GenerateRequest("a cat", width=16, height=16, steps=2)
PLAN = "transformer=torchao/int8wo"
FORMATS = [
    *("torchao/int8wo", "torchao/fp8wo", "torchao/nvfp4wo", "torchao/int8dq"),
    *("bitsandbytes_4bit/nf4", "bitsandbytes_4bit/nf4?double_quant=true", "bitsandbytes_8bit/int8"),
    *("quanto/int8", "quanto/int4", "quanto/int2", "quanto/float8"),
    *("gguf/Q8_0", "gguf/Q4_0"),
]


def load(source, store, plan=PLAN, **settings):
    return load_pipeline(LoadRequest(str(source), parse_plan(plan), store=store, **settings))


def kinds(pipeline):
    """Those of the quantized components."""
    return [pipeline.origins[name].kind for name in pipeline.specs]


def reported(pipeline):
    """What it is, without how it came."""
    told = as_data(inspect_pipeline(pipeline))
    for component in told["components"]:
        for key in ("origin", "load_seconds", "origin_note"):
            del component[key]
    return told


def left_in(folder):
    return (
        sorted(path.name for path in folder.iterdir() if path.name not in (".locks", ".digests"))
        if folder.is_dir()
        else []
    )


@pytest.mark.parametrize("scheme", FORMATS)
def test_what_comes_from_the_store_is_what_was_quantized(tiny, tmp_path, scheme):
    plan = f"transformer={scheme},text_encoder_3={scheme}"
    pipelines = [load(tiny("sd3"), store, plan) for store in ("off", tmp_path, tmp_path)]
    assert [kinds(pipeline) for pipeline in pipelines] == [["quantized"] * 2, ["stored"] * 2, ["store"] * 2]
    quantized, *others = pipelines
    sizes = {entry.manifest["component"]: entry.size for entry in Store(tmp_path).entries()}
    for name in quantized.specs:
        assert footprint(quantized.models[name]) <= sizes[name]
    image, report = generate(quantized, REQUEST), reported(quantized)
    for other in others:
        assert torch.equal(generate(other, REQUEST), image)
        assert reported(other) == report
        assert {name: footprint(model) for name, model in other.models.items()} == {
            name: footprint(model) for name, model in quantized.models.items()
        }


@pytest.mark.parametrize(
    "settings",
    [
        {"plan": "transformer=torchao/fp8wo"},
        {"plan": "transformer=quanto/int8"},
        {"plan": "transformer=torchao/int8wo?skip=proj_out"},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_what_makes_other_bits_makes_another_entry(tiny, tmp_path, settings):
    assert kinds(load(tiny("sd3"), tmp_path)) == ["stored"]
    assert kinds(load(tiny("sd3"), tmp_path, **settings)) == ["stored"]
    assert kinds(load(tiny("sd3"), tmp_path, **settings)) == kinds(load(tiny("sd3"), tmp_path)) == ["store"]
    assert len(Store(tmp_path).entries()) == 2


def bytes_at(file, place, data):
    """Overwrite a file in place, which keeps all that is told of it but what the system notes."""
    told = file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(data)
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))


def sample(file):
    """A byte that none of the pieces has that are compared."""
    size, places = file.stat().st_size, digests._PLACES
    starts = [max(size - digests._PIECE, 0) * place // (places - 1) for place in range(places)]
    covered = {byte for start in starts for byte in range(start, start + digests._PIECE)}
    return next(byte for byte in range(size - 2, 0, -2) if not covered & {byte, byte + 1})


@pytest.mark.parametrize("change", ["last weight", "a weight between", "config"])
def test_a_checkpoint_that_changed_makes_another_entry(copy, edit, tmp_path, monkeypatch, change):
    monkeypatch.setattr(digests, "_RESTED", -1)  # as if the file were old
    monkeypatch.setattr(digests, "_PIECE", 64)
    source, store = copy("sd3"), tmp_path / "store"
    before = load(source, store)
    assert list((store / ".digests").iterdir())
    (file,) = (source / "transformer").glob("*.safetensors")
    if change == "config":
        edit(source / "transformer" / "config.json", _name_or_path="elsewhere")
    else:
        place = file.stat().st_size - 2 if change == "last weight" else sample(file)
        bytes_at(file, place, b"\x12\x3f")
    after = load(source, store)
    assert kinds(after) == ["stored"] and len(Store(store).entries()) == 2
    assert torch.equal(generate(after, REQUEST), generate(load(source, "off"), REQUEST))
    assert kinds(before) == ["stored"]


@pytest.mark.parametrize("change", ["time", "folder"])
def test_a_checkpoint_of_the_same_bytes_has_the_same_entry(copy, tmp_path, change):
    source, store = copy("sd3"), tmp_path / "store"
    load(source, store)
    if change == "time":
        for file in source.rglob("*.safetensors"):
            os.utime(file, (1e9, 1e9))
    else:
        source = source.rename(source.with_name("elsewhere"))
    assert kinds(load(source, store)) == ["store"] and len(Store(store).entries()) == 1


def test_models_whose_files_agree_in_all_but_their_weights_have_their_own(copy, tiny, tmp_path):
    file = "transformer/diffusion_pytorch_model.safetensors"
    folders = [copy("sd3"), shutil.copytree(tiny("sd3"), tmp_path / "other")]
    bytes_at(folders[1] / file, (folders[1] / file).stat().st_size - 2, b"\x12\x3f")
    for folder in folders:
        os.utime(folder / file, (1e9, 1e9))  # as archives and images have it that are made to be reproducible
    found = [load(folder, tmp_path / "store") for folder in folders]
    assert [kinds(pipeline) for pipeline in found] == [["stored"], ["stored"]]
    for folder, pipeline in zip(folders, found, strict=True):
        assert torch.equal(generate(pipeline, REQUEST), generate(load(folder, "off"), REQUEST))


def test_a_checksum_is_made_once_and_again_where_it_cannot_be_kept(copy, tmp_path, monkeypatch):
    file = copy("sd3") / "transformer/diffusion_pytorch_model.safetensors"
    read, reads = digests._read, []
    monkeypatch.setattr(digests, "_read", lambda *arguments: reads.append(1) or read(*arguments))
    made = [digests.checksum(file, tmp_path / "notes", lambda: None) for _ in range(2)]
    assert len(reads) == 2, "a file that was just written may change without a new time"
    monkeypatch.setattr(digests, "_RESTED", -1)
    made += [digests.checksum(file, tmp_path / "notes", lambda: None) for _ in range(3)]
    assert len(reads) == 3
    (note,) = (tmp_path / "notes").iterdir()
    assert file.name not in note.read_text() and str(tmp_path) not in note.read_text()
    note.write_text("[]")
    made.append(digests.checksum(file, tmp_path / "notes", lambda: None))
    (tmp_path / "taken").write_text("")
    made += [digests.checksum(file, tmp_path / "taken", lambda: None) for _ in range(2)]
    assert len(set(made)) == 1 and made[0] == record(file).xxh3_128


def test_a_checksum_is_known_after_a_mount_and_made_again_after_a_change(copy, tmp_path, monkeypatch):
    file, notes, reads = copy("sd3") / "transformer/diffusion_pytorch_model.safetensors", tmp_path / "notes", []
    read, stat = digests._read, os.fstat
    monkeypatch.setattr(digests, "_read", lambda *arguments: reads.append(1) or read(*arguments))
    monkeypatch.setattr(digests, "_RESTED", -1)
    digests.checksum(file, notes, lambda: None)

    def mounted(number):  # under another number, as a network's file system
        about = stat(number)
        names = {name: getattr(about, name) for name in dir(about) if name.startswith("st_")}
        return SimpleNamespace(**names | {"st_dev": about.st_dev + 1})

    monkeypatch.setattr(digests.os, "fstat", mounted)
    digests.checksum(file, notes, lambda: None)
    assert len(reads) == 1
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))  # which changes its last change alone
    digests.checksum(file, notes, lambda: None)
    assert len(reads) == 2


def test_a_checkpoint_that_changes_while_it_is_quantized_is_not_stored(copy, tmp_path, monkeypatch):
    source, store = copy("sd3"), tmp_path / "store"
    (file,) = (source / "transformer").glob("*.safetensors")
    write = quantizing.write_entry

    def meanwhile(*arguments):
        write(*arguments)
        bytes_at(file, file.stat().st_size - 2, b"\x12\x3f")

    monkeypatch.setattr(quantizing, "write_entry", meanwhile)
    pipeline = load(source, store)
    assert pipeline.origins["transformer"].note == "its checkpoint changed meanwhile" and left_in(store) == []
    assert torch.equal(generate(pipeline, REQUEST), generate(load(source, "off"), REQUEST))


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=str)
def stored_as(request, tmp_path_factory):
    """A dtype, and name -> folder of a tiny pipeline in it."""

    def folder(name):
        torch.manual_seed(0)
        made = tmp_path_factory.mktemp("dtypes") / name
        BUILDERS[name]().to(request.param).save_pretrained(made)
        return made

    return request.param, folder


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_mapped_and_cast_is_what_the_libraries_read(stored_as, name):
    dtype, folder = stored_as
    mapped = set()
    for component, info in read_index(folder(name)).models.items():
        with quiet_libraries(), torch.no_grad():
            expected = dict(all_tensors(read_weights(info, torch.bfloat16, None)))
            model = read_mapped(info, torch.bfloat16, weight_files(info))
            dtypes = {tensor.dtype for tensor in model.parameters()}
            if dtype in dtypes and torch.bfloat16 not in dtypes:
                mapped.add(component)
            found = dict(all_tensors(cast(model, torch.bfloat16)))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), f"{component}.{key}"
    assert mapped & {"transformer", "unet"}, "the largest component was converted as a whole"


@pytest.fixture
def three(tiny, tmp_path):
    """Three entries, all used long ago, and their plans; the first longest ago."""
    plans = [f"transformer={scheme}" for scheme in ("torchao/int8wo", "quanto/int8", "gguf/Q8_0")]
    entries = {}
    for age, plan in enumerate(plans):
        load(tiny("sd3"), tmp_path, plan)
        gc.collect()
        (new,) = (entry for entry in Store(tmp_path).entries() if entry.folder not in entries.values())
        os.utime(new.folder / "manifest.json", (1e9 + age, 1e9 + age))
        entries[plan] = new.folder
    return Store(tmp_path), entries


def test_an_entry_above_the_limit_is_not_stored(tiny, tmp_path):
    pipeline = load(tiny("sd3"), tmp_path, store_limit=10_000)
    origin = pipeline.origins["transformer"]
    assert origin.kind == "quantized" and "limit" in origin.note
    assert torch.equal(generate(pipeline, REQUEST), generate(load(tiny("sd3"), "off"), REQUEST))
    assert left_in(tmp_path) == []


def test_the_entry_used_longest_ago_makes_room(tiny, three):
    store, entries = three
    first, second, third = entries
    assert kinds(load(tiny("sd3"), store.folder, first)) == ["store"]  # so that it is used last
    gc.collect()
    limit = sum(entry.size for entry in store.entries()) + 1000
    assert kinds(load(tiny("sd3"), store.folder, "transformer=torchao/fp8wo", store_limit=limit)) == ["stored"]
    kept = {entry.folder for entry in store.entries()}
    assert entries[second] not in kept and {entries[first], entries[third]} < kept and len(kept) == 3
    assert not list(store.folder.glob("*.partial"))


def test_prune_says_what_it_removed(three):
    store, entries = three
    sizes = {entry.folder: entry.size for entry in store.entries()}
    first, second, third = entries.values()
    assert store.prune(sum(sizes.values())) == []
    assert [entry.folder for entry in store.prune(sizes[second] + sizes[third])] == [first]
    assert [entry.folder for entry in store.prune()] == [second, third]
    assert left_in(store.folder) == []


def test_an_entry_in_use_is_not_removed(tiny, three):
    store, entries = three
    plan = next(iter(entries))
    pipeline = load(tiny("sd3"), store.folder, plan)
    image = generate(pipeline, REQUEST)
    removed = store.prune()
    assert entries[plan] not in [entry.folder for entry in removed] and len(removed) == 2
    assert [entry.folder for entry in store.entries()] == [entries[plan]]
    assert torch.equal(generate(pipeline, REQUEST), image)
    del pipeline
    gc.collect()
    assert [entry.folder for entry in store.prune()] == [entries[plan]]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(path, tensors, about):
    write_tensors(path, dict(list(tensors.items())[:2]), about)
    full()


def used(free):
    return lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


OWN, GGUF = "torchao/int8wo", "gguf/Q8_0"
FAILURES = [
    (OWN, "quant_core.entries.write_tensors", half_written),
    (OWN, "quant_core.container._bytes", full),
    (GGUF, "gguf.GGUFWriter.write_tensor_data", full),
    *((scheme, "quant_core.manifest.record", full) for scheme in (OWN, GGUF)),
    *((scheme, "os.fsync", full) for scheme in (OWN, GGUF)),
    *((scheme, "shutil.disk_usage", used(free=0)) for scheme in (OWN, GGUF)),
]


def assert_unstored(source, store, plan=PLAN):
    pipeline = load(source, store, plan)
    origin = pipeline.origins["transformer"]
    assert origin.kind == "quantized" and origin.note
    assert torch.equal(generate(pipeline, REQUEST), generate(load(source, "off", plan), REQUEST))


@pytest.mark.parametrize(("scheme", "where", "failure"), FAILURES, ids=[f"{one}-{two}" for one, two, _ in FAILURES])
def test_a_full_disk_costs_only_the_entry(tiny, tmp_path, monkeypatch, scheme, where, failure):
    plan = f"transformer={scheme}"
    with monkeypatch.context() as patch:
        patch.setattr(where, failure)
        assert_unstored(tiny("sd3"), tmp_path, plan)
    assert left_in(tmp_path) == []
    assert kinds(load(tiny("sd3"), tmp_path, plan)) == ["stored"]


def test_a_folder_that_cannot_be_made_costs_only_the_entry(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    for store in (tmp_path / "file", tmp_path / "file" / "store"):
        assert_unstored(tiny("sd3"), store)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("scheme", [OWN, GGUF])
def test_a_small_disk_costs_only_the_entry(tiny, small_disk, monkeypatch, announced, scheme):
    if not announced:
        monkeypatch.setattr("shutil.disk_usage", used(free=10**9))
    assert_unstored(tiny("sd3"), small_disk, f"transformer={scheme}")
    assert left_in(small_disk) == []


def test_the_limit_holds_while_entries_are_in_use(tiny, tmp_path):
    first = load(tiny("sd3"), tmp_path)
    (entry,) = Store(tmp_path).entries()
    limit = entry.size + entry.size // 2
    second = load(tiny("sd3"), tmp_path, "transformer=quanto/int8", store_limit=limit)
    origin = second.origins["transformer"]
    assert origin.kind == "quantized" and "are in use" in origin.note
    assert [entry.folder.name for entry in Store(tmp_path).entries()] == [entry.folder.name]
    del first
    assert kinds(load(tiny("sd3"), tmp_path, "transformer=quanto/int8", store_limit=limit)) == ["stored"]
