"""Drive a headless Chromium over its DevTools protocol, with nothing but the standard library.

With --remote-debugging-pipe the browser reads commands on descriptor 3 and writes answers and
events on descriptor 4: JSON texts, each followed by a zero byte. A command has an `id`, which its
answer repeats. The protocol: https://chromedevtools.github.io/devtools-protocol/
"""
import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers import PATIENCE, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu",
         "--no-sandbox",  # it runs only our own page, and as root there is no sandbox
         "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking",
         "--disable-breakpad", "--disable-component-update", "--disable-sync", "--mute-audio")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27}  # and their codes on Windows, which the protocol uses


def find_browser() -> str | None:
    """Return the path of a browser that can be driven, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def running_browser() -> Iterator["Browser"]:
    """Run a browser with a new profile; at the end it is gone, and so is the profile."""
    with tempfile.TemporaryDirectory(prefix="browser-") as profile:
        browser = Browser(profile)
        try:
            yield browser
        finally:
            browser.close()


class Browser:
    """A browser process, and the pipes to it."""

    def __init__(self, profile: str):
        self.profile = profile
        (its_input, commands), (answers, its_output) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (its_input, its_output)]
        environment = {**os.environ, "HOME": profile, "XDG_CONFIG_HOME": profile,
                       "XDG_CACHE_HOME": profile}
        command = [find_browser() or NAMES[0], *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = [(os.POSIX_SPAWN_OPEN, end, os.devnull, os.O_RDWR, 0) for end in (0, 1, 2)]
        self.pid = os.posix_spawn(command[0], command, environment, setpgroup=0, file_actions=[
            *quiet, *((os.POSIX_SPAWN_DUP2, end, 3 + n) for n, end in enumerate(ends))])
        for end in (its_input, its_output, *ends):
            os.close(end)
        self.commands, self.answers = commands, answers
        self._unread, self._id = b"", 0
        self.events: list[dict] = []  # those that no Page has taken yet

    def send(self, method: str, session: str = "", **parameters: Any) -> Any:
        """Send a command, and return the result in its answer. Raises AssertionError if refused."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != message["id"]:
            self.events.append(answer)
        if "error" in answer:
            raise AssertionError(f"the browser refused {method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._unread:
            if not select.select([self.answers], [], [], PATIENCE)[0]:
                raise AssertionError(f"the browser did not answer within {PATIENCE:g} s")
            if not (data := os.read(self.answers, 1 << 20)):
                raise AssertionError("the browser ended")
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\0")
        return json.loads(text)

    def open(self, url: str) -> "Page":
        """Open a page in a new tab."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        page.send("Page.navigate", url=url)
        return page

    def close(self) -> None:
        """End the browser and all its processes, by force those that do not end by themselves."""
        with contextlib.suppress(AssertionError, OSError):
            self.send("Browser.close")
            while True:  # until the pipe ends, which raises AssertionError
                self._read()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        wait_until(lambda: not self.processes(), "the browser's processes to end")
        os.close(self.commands)
        os.close(self.answers)

    def processes(self) -> list[str]:
        """Return a line of ps for each process that belongs to this browser and still runs."""
        table = subprocess.run(["ps", "-ww", "-eo", "pgid=,state=,args="], capture_output=True,
                               text=True, check=True).stdout
        return [line for line in table.splitlines()
                if (line.split()[0] == str(self.pid) or self.profile in line)
                and not line.split()[1].startswith("Z")]


class Page:
    """A tab of the browser."""

    def __init__(self, browser: Browser, target: str, session: str):
        self.browser, self.target, self.session = browser, target, session
        self._complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        return self.browser.send(method, self.session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript, wait for it if it is a promise, and return its value."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_until(self, expression: str, what: str) -> None:
        """Wait until a JavaScript expression is true. Raises AssertionError with the page's text.

        `what` says what the page should show.
        """
        try:
            wait_until(lambda: self.evaluate(f"!!({expression})"), f"the page: {what}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows:\n{self.text()}") from None

    def text(self, selector: str = "body") -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def shows(self, selector: str, text: str) -> None:
        """Wait until an element has a text in it."""
        self.wait_until(f"[...document.querySelectorAll({json.dumps(selector)})].some(element =>"
                        f" element.textContent.includes({json.dumps(text)}))",
                        f"{text!r} in {selector}")

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key: str) -> None:
        """Press a key as a person would: a letter, or one of KEYS."""
        code = {"windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {}
        text = {"text": "\r" if key == "Enter" else key} if key not in ("Tab", "Escape") else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, **code)

    def look_like(self, width: int, height: int, scheme: str) -> None:
        """Set the size in pixels, and the colour scheme: light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def complaints(self) -> list[str]:
        """Return what the browser has to say against the page: errors, dialogs, CSP violations."""
        self.evaluate("0")  # the events before this answer have been read now
        mine = [event for event in self.browser.events if event.get("sessionId") == self.session]
        self.browser.events = [event for event in self.browser.events if event not in mine]
        for event in mine:
            said = event["params"]
            match event["method"]:
                case "Runtime.exceptionThrown" | "Page.javascriptDialogOpening":
                    self._complaints.append(f"{event['method']}: {said}")
                case "Runtime.consoleAPICalled" if said["type"] in ("error", "assert"):
                    self._complaints.append(f"console: {said['args']}")
                case "Log.entryAdded" if said["entry"]["level"] == "error":
                    self._complaints.append(f"log: {said['entry']['text']}")
        return self._complaints

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)
