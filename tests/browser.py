"""Chromium without a window, driven over a pipe (the DevTools protocol): pages, real key events, what a page shows."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time

KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8}


class Browser:
    """One page; every call waits for the browser's answer."""

    def __init__(self, profile):
        program = shutil.which("chromium")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4.
        start = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            ["bash", "-c", start, program, *options, "about:blank"],
            pass_fds=(to_browser, from_browser),
            env=os.environ | {"HOME": str(profile)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._rest, self._session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method, **params):
        """The result of a command of the protocol."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self):
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 60)[0], "the browser does not answer"
            self._rest += os.read(self._read, 2**20) or b"{}\0"
        message, _, self._rest = self._rest.partition(b"\0")
        assert message != b"{}", "the browser has ended"
        return json.loads(message)

    def open(self, address):
        self.call("Page.navigate", url=address)

    def value(self, expression):
        """Of JavaScript."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression):
        """Until it is true."""
        end = time.monotonic() + 60
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} stays false: {self.value('document.body.innerText')}"
            time.sleep(0.01)

    def press(self, key, **more):
        """A key as the keyboard sends it, to whatever has the focus."""
        same = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]} | more
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **same)
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def close(self):
        with contextlib.suppress(OSError):
            os.close(self._write)  # which ends it
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
