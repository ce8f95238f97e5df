import json
import os
import shutil

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # of the subprocesses


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory):
    """One thread, and no store but where a test names one, here and in subprocesses."""
    import torch

    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("QUANTIZED_DIFFUSERS_STORE", "off")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Name -> folder of a tiny pipeline, made at its first use."""
    from .tiny_pipelines import save

    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("tiny") / name
            save(name, made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def pipelines(tiny):
    """Name -> that tiny pipeline or the demo, loaded once for all tests of a file."""
    from quant_core import LoadRequest, load_pipeline

    loaded = {}

    def pipeline(name):
        if name not in loaded:
            loaded[name] = load_pipeline(LoadRequest("demo" if name == "demo" else str(tiny(name))))
        return loaded[name]

    return pipeline


@pytest.fixture
def copy(tiny, tmp_path):
    """Name -> a copy of a tiny pipeline that the test may damage."""
    return lambda name: shutil.copytree(tiny(name), tmp_path / "models" / name)


@pytest.fixture(scope="session")
def edit():
    """Change a JSON file in place."""

    def change(path, **values):
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | values))

    return change


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Component of the demo -> (the demo with it as gguf/Q8_0, the file that was made)."""
    from quant_core import LoadRequest, load_pipeline, parse_plan

    found = {}

    def component(name):
        if name not in found:
            cache = tmp_path_factory.mktemp(name)
            pipeline = load_pipeline(LoadRequest("demo", parse_plan(f"{name}=gguf/Q8_0"), store=cache))
            (file,) = cache.glob("*/*.gguf")
            found[name] = pipeline, file
        return found[name]

    return component


@pytest.fixture
def no_network(monkeypatch):
    """Any connection is a failure."""
    import socket

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
