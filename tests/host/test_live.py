"""What a browser sees while a prompt runs in a real ComfyUI that was started with previews: pytest -m host"""

import io
import json
import shutil
import struct
import subprocess

import pytest
import websocket
from PIL import Image

from .conftest import COMFYUI, PYTHON, ROOT, start

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not (COMFYUI / "main.py").is_file() or not PYTHON.exists(), reason="no ComfyUI"),
]

PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4  # ComfyUI's protocol.py, BinaryEventTypes
STEPS = 60


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "Any Name v1.0").symlink_to(ROOT)
    shutil.copytree(ROOT / "demo_model/pipeline", folder / "models/diffusers/landscapes")
    host, process = start(folder, "--preview-method", "auto")
    yield host
    process.terminate()
    process.wait(30)


def prompt(backend="torchao/int8wo", **inputs):
    api = json.loads((ROOT / "example_workflows/api/demo_default.json").read_text())
    changes = {"QDiff_Generate": inputs, "QDiff_QuantMapping": {"text": backend}}
    for node in api.values():
        node["inputs"].update(changes.get(node["class_type"], {}))
        if node["class_type"] == "QDiff_QuantMapping":
            node["inputs"].pop("default", None)
    return api


def node(api, class_type):
    return next(key for key, value in api.items() if value["class_type"] == class_type)


class Client:
    """A browser's socket, and what came over it until the prompt was done."""

    def __init__(self, host, name, metadata=False):
        self.name = name
        self.host = host
        url = host.url.replace("http", "ws")
        self.socket = websocket.create_connection(f"{url}/ws?clientId={name}", timeout=120)
        if metadata:
            self.socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))

    def messages(self, api, **further):
        """(kind, data) of each: a number and bytes, or a name and a dictionary; the last one included."""
        answer = self.host.post(api, client_id=self.name, **further)
        assert not answer.get("node_errors"), answer
        while True:
            message = self.socket.recv()
            if isinstance(message, bytes):
                yield struct.unpack(">I", message[:4])[0], message[4:]
                continue
            event = json.loads(message)
            yield event["type"], event["data"]
            ours = event["data"].get("prompt_id") == answer["prompt_id"]
            ends = event["type"] in ("execution_error", "execution_interrupted")
            if ours and (ends or (event["type"] == "executing" and event["data"]["node"] is None)):
                self.socket.close()
                return

    def binary(self, api, **further):
        found = {}
        for kind, data in self.messages(api, **further):
            assert kind != "execution_error", data
            if isinstance(kind, int):
                found.setdefault(kind, []).append(data)
        return found


def text_of(data):
    """(node, text) of a TEXT message."""
    (length,) = struct.unpack(">I", data[:4])
    return data[4 : 4 + length].decode(), data[4 + length :].decode()


def test_previews_and_text_arrive_while_generating(live):
    api = prompt(steps=STEPS, seed=1)
    found = Client(live, "plain").binary(api)
    assert PREVIEW_WITH_METADATA not in found
    pictures = [Image.open(io.BytesIO(data[4:])).convert("RGB") for data in found[PREVIEW]]
    assert len(pictures) >= 2 and {max(picture.size) for picture in pictures} == {256}
    assert pictures[0].tobytes() != pictures[-1].tobytes()
    assert len(pictures[-1].resize((16, 16)).getcolors(256)) > 50  # not one flat colour
    texts = [text for id, text in map(text_of, found[TEXT]) if id == node(api, "QDiff_Generate")]
    assert texts[-1].startswith(f"{STEPS} steps in ") and texts[-1].split()[-1] in ("steps/s", "s/step")
    assert any(text.endswith(" left") for text in texts)
    loading = [text for id, text in map(text_of, found[TEXT]) if id == node(api, "QDiff_LoadPipeline")]
    assert loading and " of " in loading[-1] and loading[-1].endswith("MB")
    assert "FluxPipeline (" in live.log and f"{STEPS} steps in " in live.log


def test_a_client_that_takes_metadata_gets_previews_that_name_their_node(live):
    api = prompt(steps=STEPS, seed=2)
    found = Client(live, "metadata", metadata=True).binary(api)
    assert PREVIEW not in found and len(found[PREVIEW_WITH_METADATA]) >= 2
    for data in found[PREVIEW_WITH_METADATA]:
        (length,) = struct.unpack(">I", data[:4])
        metadata = json.loads(data[4 : 4 + length])
        assert metadata["node_id"] == node(api, "QDiff_Generate") and metadata["image_type"] == "image/jpeg"
        assert Image.open(io.BytesIO(data[4 + length :])).format == "JPEG"


def test_a_prompt_may_turn_previews_off(live):
    found = Client(live, "off").binary(prompt(steps=STEPS, seed=3), extra_data={"preview_method": "none"})
    assert PREVIEW not in found and PREVIEW_WITH_METADATA not in found and found[TEXT]


ASK_FORMATS = """
import json, sys
import torch
from comfy.cli_args import LatentPreviewMethod, args
args.cpu, args.preview_method = True, LatentPreviewMethod.Auto
import comfy.latent_formats as formats
import latent_preview
found = {}
for name in json.loads(sys.stdin.read()):
    known = getattr(formats, name)()
    shape = (1, known.latent_channels, *([1] if known.latent_dimensions == 3 else []), 6, 8)
    previewer = latent_preview.get_previewer(torch.device("cpu"), known)
    size = previewer and previewer.decode_latent_to_preview_image("JPEG", torch.zeros(shape))[1].size
    found[name] = known.latent_channels, known.scale_factor, size
print(json.dumps(found))
"""


def test_comfyui_has_the_latent_formats_that_its_previews_are_asked_for():
    from quant_pack.nodes.comfy_progress import _FORMATS

    command = [str(PYTHON), "-c", ASK_FORMATS]
    answer = subprocess.run(
        command, input=json.dumps(list(_FORMATS.values())), cwd=COMFYUI, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    for (_, channels, scaling), name in _FORMATS.items():
        theirs, scale, size = found[name]
        patches = {"Flux2": 4}.get(name, 1)  # which are packed before they are normalised
        assert theirs == channels * patches, name
        assert scaling in (None, scale), name
        assert size in ([8, 6], [16, 12], None), name  # none: ComfyUI has no colours for it


def test_cancelling_stops_a_load_within_a_component(live):
    api = prompt("gguf/Q5_1", steps=1, seed=4)
    loader, asked, last = node(api, "QDiff_LoadPipeline"), None, None
    for kind, data in Client(live, "cancel").messages(api):
        if kind == "progress" and data["node"] == loader:
            last = data
            if not asked and data["value"] > 0:
                asked = data
                live.get("/interrupt", {})
    assert kind == "execution_interrupted" and data["node_id"] == loader
    assert asked["max"] > 10**7 and 0 < asked["value"] <= last["value"] < last["max"]
    assert "execution_interrupted" not in dict(live.run(prompt(steps=1, seed=5))["status"]["messages"])
