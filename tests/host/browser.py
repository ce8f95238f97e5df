"""A page of ComfyUI in a headless Chromium, driven over its DevTools protocol."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request

import websocket

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RUN = """async () => {
  const names = ["execution_success", "execution_error", "execution_interrupted"];
  const end = new Promise((done) => names.forEach((name) => app.api.addEventListener(name, () => done(name))));
  await app.queuePrompt(0);
  return Object.keys(app.lastNodeErrors ?? {}).length ? "refused" : await end;
}"""
KEYS = {"Enter": 13, "Tab": 9, "Escape": 27}


class Page:
    """One tab, once ComfyUI's graph is there."""

    def __init__(self, host, folder, modern):
        self.host = host
        for name, value in {"Comfy.VueNodes.Enabled": modern, "Comfy.TutorialCompleted": True}.items():
            host.get(f"/settings/{name}", value)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-allow-origins=*"]
        flags += ["--window-size=1600,1000", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=log, stderr=log)
        port = self.until(lambda: (folder / "DevToolsActivePort").read_text().split()[0], OSError)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as reply:
            (tab,) = [tab for tab in json.load(reply) if tab["type"] == "page"]
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=300)
        self.sent = 0
        self.send("Page.navigate", url=host.url)
        self.until(lambda: self("() => Boolean(window.app?.graph && app.vueAppReady && app.extensionManager)"))
        time.sleep(2)

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

    @staticmethod
    def until(ask, *errors, seconds=120):
        """What `ask` says once it says something."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(*errors):
                if found := ask():
                    return found
            time.sleep(0.2)
        raise AssertionError("waited too long")

    def send(self, method, **parameters):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    def __call__(self, function, *arguments):
        """What a JavaScript function says to its arguments."""
        expression = f"({function})({', '.join(map(json.dumps, arguments))})"
        done = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def click(self, x, y):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        time.sleep(0.5)

    def write(self, text):
        self.send("Input.insertText", text=text)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])
        time.sleep(0.5)

    def click_on(self, element):
        """Click into the middle of what a function finds."""
        box = self(f"() => JSON.stringify(({element})().getBoundingClientRect())")
        self.click(*self.middle(json.loads(box)))

    @staticmethod
    def middle(box):
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def load(self, workflow, name):
        """Open a workflow in a tab of its own."""
        self("(workflow, name) => app.loadGraphData(workflow, true, true, name)", workflow, name)
        time.sleep(1.5)

    def run(self):
        """Queue the graph, and wait for its end: the event's name, or refused."""
        end = self(RUN)
        time.sleep(1)
        return end
