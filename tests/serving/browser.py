"""A headless Chromium, driven through its own debugging protocol: no driver program, no package but websockets."""

import json
import shutil
import subprocess
import time
import urllib.request
from base64 import b64decode
from contextlib import contextmanager
from functools import cache
from itertools import count

from websockets.sync.client import connect

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)


@cache
def find():
    """The browser's path, or None where there is none that runs (some systems ship a stub)."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    return None


class Page:
    """One tab."""

    def __init__(self, socket):
        self._socket, self._numbers = socket, count(1)

    def send(self, method, **parameters):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(30))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, address):
        self.send("Page.navigate", url=address)

    def run(self, script):
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", found))
        return found["result"].get("value")

    def until(self, script, seconds=15):
        """Wait until an expression is true; what it was last."""
        deadline = time.monotonic() + seconds
        found = None
        while time.monotonic() < deadline:
            try:
                if found := self.run(script):
                    return found
            except RuntimeError as error:  # the page is being replaced
                found = error
            time.sleep(0.05)
        raise AssertionError(f"{script} stayed {found!r}; the page shows: {self.run('document.body.innerText')}")

    def scheme(self, name):
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, file, width=1280, height=1150):
        """Write what the page looks like."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        file.write_bytes(b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browsing(profile):
    """A browser with an empty profile; yields its one tab."""
    process = subprocess.Popen([find(), *FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL)
    try:
        told = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not told.exists() or not told.read_text().strip():
            assert process.poll() is None, "the browser ended before it opened"
            assert time.monotonic() < deadline, "the browser did not open"
            time.sleep(0.05)
        port = told.read_text().split()[0]
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        tab = next(tab for tab in tabs if tab["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(20)
