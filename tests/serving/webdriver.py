"""Chromium, driven over chromedriver's W3C WebDriver interface, without a package."""

import json
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from urllib import request
from urllib.error import HTTPError

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium")

#: Seconds after which something is taken not to happen, however busy the machine is.
DEADLINE = 120

#: No sandbox: there is none for root, and what is opened is the project's own page.
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

#: The key under which an element's id stands, as the standard has it.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"

CONTROL, ENTER, HOME, RIGHT = "\ue009", "\ue007", "\ue011", "\ue014"

_open = request.build_opener(request.ProxyHandler({})).open


class BrowserError(Exception):
    """What chromedriver answered instead of doing what it was asked."""


def wait_for(what, found=bool):
    """What ``what`` returns, once that is ``found``."""
    end = time.monotonic() + DEADLINE
    while not found(value := what()):
        assert time.monotonic() < end, f"still {value!r} after {DEADLINE} s"
        time.sleep(0.02)
    return value


def call(url: str, body=None, method: str | None = None):
    """The value of an answer; with a body (a dictionary) the request is a POST."""
    raw = None if body is None else json.dumps(body).encode()
    asked = request.Request(url, raw, {"Content-Type": "application/json"})
    asked.method = method or asked.get_method()
    try:
        with _open(asked, timeout=DEADLINE) as answer:
            return json.load(answer)["value"]
    except HTTPError as error:
        with error:
            raise BrowserError(error.read().decode()) from None


class Browser:
    """A Chromium with an empty profile; closing it ends both of its processes."""

    def __init__(self):
        with ExitStack() as stack:
            # What is left of Chromium may still write while the folder goes.
            scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(scratch))
            said = folder / "chromedriver"
            with said.open("wb") as log:
                driver = subprocess.Popen([DRIVER, "--port=0"], stdout=log, stderr=log)
            stack.callback(driver.wait)
            stack.callback(driver.terminate)
            port = wait_for(lambda: self._port(said, driver))
            profile = f"--user-data-dir={folder / 'profile'}"
            options = {"binary": CHROMIUM, "args": [*ARGUMENTS, profile]}
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            url = f"http://127.0.0.1:{port}/session"
            opened = call(url, {"capabilities": {"alwaysMatch": wanted}})
            self._url = f"{url}/{opened['sessionId']}"
            stack.callback(call, self._url, method="DELETE")
            self.close = stack.pop_all().close

    @staticmethod
    def _port(said: Path, driver: subprocess.Popen) -> str | None:
        text = said.read_text()
        assert driver.poll() is None, text
        _, _, rest = text.partition("started successfully on port ")
        port, end, _ = rest.partition(".")
        return port if end else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        call(f"{self._url}/url", {"url": url})

    def run(self, code: str, *arguments):
        """Run a function's body in the page; a promise is waited for."""
        body = {"script": code, "args": arguments}
        return call(f"{self._url}/execute/sync", body)

    def log(self) -> list[dict]:
        """The console's messages since they were last asked for."""
        return call(f"{self._url}/se/log", {"type": "browser"})

    def press(self, name: str, *keys: str) -> None:
        """Type into the element with that id, modifiers held until the last key."""
        body = {"text": "".join(keys)}
        call(f"{self._element(name)}/value", body)

    def type(self, name: str, text: str) -> None:
        """Type a text in the place of what the field holds."""
        call(f"{self._element(name)}/clear", {})
        self.press(name, text)

    def click(self, name: str) -> None:
        call(f"{self._element(name)}/click", {})

    def text(self, name: str) -> str:
        """All text of an element, spaces and line breaks as they stand there."""
        return self.run(
            "return document.getElementById(arguments[0]).textContent", name
        )

    def _element(self, name: str) -> str:
        wanted = {"using": "css selector", "value": f"#{name}"}
        return f"{self._url}/element/{call(f'{self._url}/element', wanted)[ELEMENT]}"
