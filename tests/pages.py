"""What an HTML page holds, by its own text and by what a browser says of it."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Outline(HTMLParser):
    """Elements of a page; checks on its way that all that is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "  # cells of a table have nothing between them

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for found, attributes in self.elements if found == tag and name in attributes]


@dataclass(frozen=True)
class Visit:
    """What happened while a browser showed a page."""

    console: list[str]
    """Messages of the page: errors, warnings, and refusals of its own security policy."""
    requests: list[str]
    """URLs that the page asked the network for."""
    picture: Path


def visit_page(page: Path, folder: Path, *, width: int = 800) -> Visit:
    """Show a page in headless Chromium, or skip the test where there is none.

    Args:
        folder: for the browser's profile, its log and a screenshot.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    picture, net_log = folder / "page.png", folder / "net-log.json"
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={width},600", "--enable-logging=stderr",
            f"--log-net-log={net_log}", f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert picture.is_file(), done.stderr
    events = [event.get("params") for event in json.loads(net_log.read_text(encoding="utf-8"))["events"]]
    # what the browser itself asks of its maker has no origin; what a page asks has one, be it an opaque one
    asked = [
        one for one in events if isinstance(one, dict) and one.get("initiator", "not an origin") != "not an origin"
    ]
    return Visit(
        console=[line for line in done.stderr.splitlines() if "CONSOLE" in line],
        requests=[one["url"] for one in asked],
        picture=picture,
    )
