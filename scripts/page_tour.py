"""A tour of the served page in headless Chromium: draws, chooses, edits, maps, undoes, forks, at 1280 and 390 px.

Fails where the page is wider than its window, asks any address but this machine's, shows a picture without a draft
before it, or says something wrong. Writes screenshots. Needs the extra `ui`, playwright, and Debian's chromium:

    pip install playwright && apt-get install chromium
    python scripts/page_tour.py --output out/page
"""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

WIDTHS = {1280: 900, 390: 844}  # pixels: width and height of a window
WAIT_MS = 60_000  # for anything to happen, on a busy machine
PICTURES = 3  # that are drawn until a draft was seen: a browser may take two updates of the page in one go
LOCAL = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost|\[::1\])[:/]|data:|blob:|about:")
# Notes in which order drafts and pictures appear in the conversation.
RECORD = """() => {
  window.states = [];
  const look = () => {
    const found = document.querySelectorAll('#sf-chat .sf-figure');
    const named = (f) => f.classList.contains('sf-final') ? 'final' : f.querySelector('img') ? 'draft' : 'blank';
    const line = [...found].map(named).join(' ');
    if (line && line !== window.states.at(-1)) window.states.push(line);
  };
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""
# True once nothing moves any more and every image is there.
STILL = """() => document.getAnimations().every((a) =>
    a.playState !== 'running' || a.effect.getComputedTiming().iterations === Infinity)
  && [...document.images].every((image) => image.complete)"""


class TourError(Exception):
    """The page does not do what it should."""


@dataclass
class Visit:
    """One window with the page in it, and what was noticed there."""

    page: Page
    folder: Path
    width: int
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Note every request to another machine, and every error of a script."""

        def request(found: Request) -> None:
            if not LOCAL.match(found.url):
                self.outside.append(found.url)

        self.page.on("request", request)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def check(self, step: str) -> None:
        """Raise TourError for a page that is too wide or asked elsewhere."""
        wide = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        if wide > 0:
            raise TourError(f"{step}: at {self.width} px the page is {wide} px wider than its window")
        if self.outside:
            raise TourError(f"{step}: asked outside this machine: {self.outside[:3]}")
        if self.errors:
            raise TourError(f"{step}: a script failed: {self.errors[:3]}")

    def shoot(self, name: str) -> None:
        """Check, and write a screenshot."""
        self.check(name)
        self.page.wait_for_function(STILL, timeout=WAIT_MS)
        self.page.screenshot(path=self.folder / f"{self.width}-{name}.png")

    def say(self, words: str) -> None:
        box = self.page.locator("#sf-box textarea")
        box.fill(words)
        box.press("Enter")

    def idle(self) -> None:
        """Wait until the box can send again."""
        expect(self.page.locator("#sf-box .submit-button")).to_be_visible(timeout=WAIT_MS)

    def tool(self, name: str) -> None:
        self.page.locator("#sf-tools").get_by_role("button", name=name, exact=True).click()

    def replies(self) -> int:
        return self.page.locator("#sf-chat .sf-reply").count()


# -- the steps --------------------------------------------------------------------------------------------------------


def arrive(visit: Visit, url: str) -> None:
    visit.page.goto(url)
    expect(visit.page.locator("#sf-box textarea")).to_be_visible(timeout=WAIT_MS)
    expect(visit.page.locator(".sf-empty").first).to_be_visible(timeout=WAIT_MS)
    visit.shoot("1-empty")


def draw(visit: Visit) -> None:
    """A picture: drafts before it, four to choose from, another one chosen."""
    visit.page.evaluate(RECORD)
    seen = [drawn(visit)]
    while "draft" not in seen[-1]:
        if len(seen) == PICTURES:
            raise TourError(f"no draft before any of {PICTURES} pictures: {seen}")
        visit.tool("Undo")
        expect(visit.page.locator("#sf-chat .sf-final")).to_have_count(0, timeout=WAIT_MS)
        seen.append(drawn(visit))
    before = visit.page.locator("#sf-chat .sf-final img").get_attribute("src")
    visit.page.locator(".sf-strip button").nth(1).click()
    expect(visit.page.locator(".sf-strip button").nth(1)).to_have_attribute("aria-checked", "true", timeout=WAIT_MS)
    expect(visit.page.locator("#sf-chat .sf-final img")).not_to_have_attribute("src", before or "", timeout=WAIT_MS)
    visit.shoot("2-drawn")


def drawn(visit: Visit) -> list[str]:
    """Draw a picture, to the end; what was seen of it in turn. Raises TourError for a draft after the picture."""
    visit.page.evaluate("window.states = []")
    visit.say("two pink hearts")
    expect(visit.page.locator("#sf-chat .sf-final")).to_have_count(1, timeout=WAIT_MS)
    expect(visit.page.locator(".sf-strip .sf-final")).to_have_count(4, timeout=WAIT_MS)
    visit.idle()
    states: list[str] = visit.page.evaluate("window.states")
    if "final" not in states or "draft" in states[states.index("final") :]:
        raise TourError(f"a draft after the picture, or no picture: {states}")
    return states


def change(visit: Visit) -> None:
    """A click on an example plays it: a picture, then an edit; then a question."""
    visit.page.get_by_role("button", name="make the star blue", exact=True).click()
    expect(visit.page.locator("#sf-chat .sf-final")).to_have_count(2, timeout=WAIT_MS)
    visit.idle()
    visit.say("what color is the star?")
    expect(visit.page.locator("#sf-chat .sf-text")).to_have_text("blue", timeout=WAIT_MS)
    visit.idle()
    visit.shoot("3-changed")


def undo_and_map(visit: Visit) -> None:
    """The question is taken back and is in the box again; then a map over the picture."""
    visit.tool("Undo")
    expect(visit.page.locator("#sf-chat .sf-text")).to_have_count(0, timeout=WAIT_MS)
    expect(visit.page.locator("#sf-box textarea")).to_have_value("what color is the star?", timeout=WAIT_MS)
    visit.tool("Map")
    expect(visit.page.locator("#sf-chat .sf-heat img")).to_be_visible(timeout=WAIT_MS)
    visit.shoot("4-map")
    visit.tool("Map")
    expect(visit.page.locator("#sf-chat .sf-heat")).to_have_count(0, timeout=WAIT_MS)


def fork(visit: Visit) -> None:
    """Two conversations with one past; more seeds in the second."""
    visit.tool("Fork")
    expect(visit.page.locator(".sf-tabs button[aria-selected=true] b")).to_have_text("3", timeout=WAIT_MS)
    visit.tool("Retry")
    expect(visit.page.locator(".sf-strip .sf-final")).to_have_count(8, timeout=WAIT_MS)
    visit.idle()
    visit.shoot("5-forked")
    visit.page.locator(".sf-tabs button").nth(1).click()
    expect(visit.page.locator(".sf-strip .sf-final")).to_have_count(4, timeout=WAIT_MS)


def upload(visit: Visit) -> None:
    """A picture of the visitor's own, and a word that the model does not know."""
    visit.tool("New")
    expect(visit.page.locator("#sf-chat .sf-said")).to_have_count(0, timeout=WAIT_MS)
    visit.page.locator("#sf-box input[type=file]").set_input_files(str(_square(visit.folder)))
    expect(visit.page.locator("#sf-box .thumbnail-item").first).to_be_visible(timeout=WAIT_MS)
    visit.say("what color is the square?")
    expect(visit.page.locator("#sf-chat .sf-text")).to_have_text("red", timeout=WAIT_MS)
    visit.idle()
    visit.say("a red elephant")
    expect(visit.page.locator("#sf-chat .sf-notice")).to_contain_text("elephant", timeout=WAIT_MS)
    visit.shoot("6-uploaded")


def _square(folder: Path) -> Path:
    """A picture that the model did not draw."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (256, 256), (250, 250, 250))
    ImageDraw.Draw(image).rectangle((80, 80, 180, 180), fill=(214, 48, 49))
    image.save(path := folder / "square.png")
    return path


def dark(visit: Visit) -> None:
    """The other colours."""
    visit.page.locator(".sf-tabs button").nth(0).click()
    expect(visit.page.locator(".sf-strip .sf-final")).to_have_count(4, timeout=WAIT_MS)
    visit.page.locator(".sf-theme").click()
    visit.shoot("7-dark")


STEPS = (draw, change, undo_and_map, fork, upload, dark)


# -- server and browser -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(log: Path) -> Iterator[str]:
    """The address of a server of nano that runs inside the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "starflow2", "serve", "--port", str(port)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            yield _ready(f"http://127.0.0.1:{port}", server)
        finally:
            server.terminate()


def _ready(url: str, server: subprocess.Popen[bytes]) -> str:
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
            return url
        if server.poll() is not None:
            raise TourError(f"the server ended with {server.returncode}; see its log")
        time.sleep(0.2)
    raise TourError("the server did not answer within two minutes")


def tour(browser: Browser, url: str, folder: Path, width: int) -> float:
    """All steps in a window of this width; seconds that they took."""
    started = time.monotonic()
    context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]}, color_scheme="light")
    visit = Visit(context.new_page(), folder, width)
    visit.watch()
    try:
        arrive(visit, f"{url}/page/")
        for step in STEPS:
            step(visit)
    except Exception:
        visit.page.screenshot(path=folder / f"{width}-failed.png", full_page=True)
        raise
    finally:
        context.close()
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out") / "page", help="folder of the screenshots")
    parser.add_argument("--url", help="of a server that runs already; else one is started")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(served(options.output / "server.log"))
        program = stack.enter_context(sync_playwright())
        browser = program.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for width in WIDTHS:
            seconds = tour(browser, url, options.output, width)
            print(
                f"{width} px: {len(STEPS) + 1} steps in {seconds:.0f} s; no overflow, no request outside this machine"
            )
        browser.close()


if __name__ == "__main__":
    main()
