"""A headless Chromium, driven over its DevTools protocol through two pipes: no driver to install, no port to find."""

import base64
import fcntl
import itertools
import json
import os
import select
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


class Chromium:
    """The browser; `visit` opens a page as a new visitor, with nothing in common with the others."""

    def __init__(self, profile: Path) -> None:
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (*os.pipe(), *os.pipe())]
        theirs_in, self.input, self.output, theirs_out = ends
        quiet = os.open(os.devnull, os.O_RDWR)
        moves = [(theirs_in, 3), (theirs_out, 4), (quiet, 1), (quiet, 2)]
        arguments = [str(PROGRAM), *FLAGS, f"--user-data-dir={profile}"]
        actions = [(os.POSIX_SPAWN_DUP2, here, there) for here, there in moves]
        self.process = os.posix_spawn(PROGRAM, arguments, os.environ, file_actions=actions)
        for end in (theirs_in, theirs_out, quiet):
            os.close(end)
        self.numbers, self.received = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result; events that come in between are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        os.write(self.input, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") != number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            if not select.select([self.output], [], [], 120)[0]:
                raise TimeoutError("Chromium has said nothing for two minutes")
            if not (part := os.read(self.output, 2**20)):
                raise RuntimeError("Chromium has ended")
            self.received += part
        message, self.received = self.received.split(b"\0", 1)
        return dict(json.loads(message))

    def visit(self, address: str, width: int = 1200, height: int = 800) -> "Page":
        """Open an address in a profile of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        for domain in ("Network", "Page", "Runtime"):
            self.call(f"{domain}.enable", session)
        self.call("Page.navigate", session, url=address)
        return Page(self, session)

    def close(self) -> None:
        """End the browser."""
        self.call("Browser.close")
        os.waitpid(self.process, 0)
        os.close(self.input)
        os.close(self.output)


@dataclass(frozen=True)
class Page:
    """One visitor's page."""

    browser: Chromium
    session: str

    def run(self, expression: str) -> Any:
        """Return what a JavaScript expression is, once it is there if it is a promise."""
        answer = self.browser.call(
            "Runtime.evaluate", self.session, expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 120) -> Any:
        """Return what an expression is as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(expression)):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{expression} is still {value!r} on a page that says {self.run('document.body.innerText')!r}"
                )
            time.sleep(0.1)
        return value

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for."""
        self.run("0")  # what was sent before has arrived with the answer
        return [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event.get("method") == "Network.requestWillBeSent" and event.get("sessionId") == self.session
        ]

    def screenshot(self, whole: bool = False) -> bytes:
        """Return a picture of the page, or of all that can be scrolled to, as PNG."""
        answer = self.browser.call("Page.captureScreenshot", self.session, captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])
