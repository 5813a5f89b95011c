"""A headless Chromium of this machine, and what every page of ours must be: silent, at home, legible, narrow enough."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ARTIFACTS = os.environ.get("FLOWKV_SCREENSHOTS")  # a folder where pictures go
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
_NAMES = ("chromium", "chromium-browser", "google-chrome")

# Every piece of text whose contrast with what is behind it is below WCAG AA: 4.5, for large or bold text 3.
_POOR_CONTRAST = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(c[i] / 255), 0);
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (node) => {
    if (node === null) return [255, 255, 255, 1];
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour[3] === 1 ? colour : over(colour, behind(node.parentElement));
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility() || node.closest("noscript, title")) continue;
    const style = getComputedStyle(node);
    const colour = parse(node.closest("svg") ? style.fill : style.color);
    const ground = behind(node);
    const [a, b] = [light(over(colour, ground)), light(ground)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (isLarge ? 3 : 4.5)) poor.push(`${walker.currentNode.textContent.trim()}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none, but never in CI."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        reason = "no Chromium on this machine: apt-get install chromium"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    expect.set_options(timeout=20_000)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none to give
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


class Watched:
    """A page, everything that it complained of, and everything that it asked for."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(base_url=url, **options)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def check(self, url: str) -> None:
        assert self.complaints == []
        assert [request for request in self.requests if not request.startswith(f"{url}/")] == []
        assert self.page.evaluate(_POOR_CONTRAST) == []
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"

    def screenshot(self, name: str) -> None:
        if ARTIFACTS is not None:
            Path(ARTIFACTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{ARTIFACTS}/{name}.png", full_page=True)


@contextmanager
def opened(
    browser: Browser, url: str, scheme: str = "light", size: str = "desktop", **options: Any
) -> Iterator[Watched]:
    width, height = SIZES[size]
    viewport = {"width": width, "height": height}
    watched = Watched(browser, url, color_scheme=scheme, viewport=viewport, has_touch=size == "phone", **options)
    try:
        yield watched
    finally:
        watched.context.close()
