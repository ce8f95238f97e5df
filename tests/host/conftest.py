"""A real ComfyUI server on the CPU, with this pack and a few tiny pipelines, driven over its API."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import websocket

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_DIR", "~/ComfyUI")).expanduser()
PYTHON = Path(os.environ.get("COMFYUI_PYTHON", COMFYUI / ".venv/bin/python"))


class Host:
    """The API of one server."""

    def __init__(self, port, base, process):
        self.url = f"http://127.0.0.1:{port}"
        self.base = base
        self.process = process

    def get(self, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            text = reply.read()
        return json.loads(text) if text else None

    def post(self, prompt, **further):
        """The prompt's id, or what the server says is wrong with it."""
        try:
            return self.get("/prompt", {"prompt": prompt, **further})
        except urllib.error.HTTPError as error:
            return json.load(error)

    def wait(self, prompt_id):
        for _ in range(6000):
            if prompt_id in (history := self.get(f"/history/{prompt_id}")):
                return history[prompt_id]
            assert self.process.poll() is None, self.log
            time.sleep(0.1)
        raise AssertionError(self.log)

    def events(self, client_id):
        """The server's events for a client, as (type, data)."""
        socket = websocket.create_connection(f"{self.url.replace('http', 'ws')}/ws?clientId={client_id}", timeout=120)
        try:
            while True:
                message = socket.recv()
                if isinstance(message, str):
                    event = json.loads(message)
                    yield event["type"], event["data"]
        finally:
            socket.close()

    def run(self, prompt):
        answer = self.post(prompt)
        assert not answer.get("node_errors"), answer
        return self.wait(answer["prompt_id"])

    @property
    def log(self):
        return (self.base / "log").read_text(encoding="utf-8", errors="replace")


def error_of(done):
    """What the failed node said."""
    messages = dict(done["status"]["messages"])
    return messages["execution_error"]["exception_message"].split("\n")[0]


def start(base, *flags, **variables):
    """A server under a base folder, once it answers; `variables` are of its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "main.py", "--cpu", "--disable-api-nodes", "--port", str(port), "--listen", "127.0.0.1"]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    environment.pop("QUANTIZED_DIFFUSERS_STORE", None)
    with (base / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=COMFYUI, stdout=log, stderr=log, env=environment)
    host = Host(port, base, process)
    for _ in range(600):
        try:
            host.get("/object_info/QDiff_Generate")
            return host, process
        except OSError:
            assert process.poll() is None, host.log
            time.sleep(0.2)
    process.kill()
    raise AssertionError(host.log)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base folder with the pack under a name of the user's choice, and a pipeline in models/diffusers."""
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "Any Name v1.0").symlink_to(ROOT)
    shutil.copytree(ROOT / "demo_model/pipeline", folder / "models/diffusers/landscapes")
    return folder


@pytest.fixture(scope="session")
def host(base):
    host, process = start(base)
    yield host
    process.terminate()
    process.wait(30)


def pytest_terminal_summary(terminalreporter):
    """Say in the last lines that the real thing was not tried."""
    if not (COMFYUI / "main.py").is_file() or not PYTHON.exists():
        terminalreporter.write_line(
            f"The host tests were skipped: there is no ComfyUI at {COMFYUI} with {PYTHON}; set COMFYUI_DIR.",
            yellow=True,
        )
