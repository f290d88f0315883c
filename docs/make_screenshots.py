"""Photograph TensorBoard: a real server on a run directory, seen by a real headless browser.

    python docs/make_screenshots.py RUN_DIR OUT.png --tags '^grad_norm/' --runs 'seed_0'
    python docs/make_screenshots.py RUN_DIR OUT.png --page custom_scalars --dark

The pictures of docs/tensorboard.md, of
`python -m experiments.stress_test --learning-rates 1e-3 3 --seeds 0 --log-dir RUNS`:

    python docs/make_screenshots.py RUNS docs/images --pages

Needs Chromium and its driver (Debian: `apt-get install chromium chromium-driver`) and selenium, which the
`test` extra brings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

TIMEOUT = 120.0  # seconds, for a server or a page on a busy machine

BROWSER_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Chromium refuses to start as root with it
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# What TensorBoard keeps in the browser. It crops outliers unless told not to, and an explosion is one.
SETTINGS = {
    "ignoreOutliers": False,
    "paginationSize": 100,
    "sideBarWidthInPercent": 20,
    "stepSelectorEnabled": False,
    "timeSeriesSettingsPaneOpened": False,
}

# [tag, number of lines] of the cards in sight, 0 while a card loads. Cards out of sight are never drawn.
# Pairs, because the driver sorts the keys of an object.
LINES_IN_SIGHT = """
const cards = [...document.querySelectorAll("scalar-card")];
const inSight = cards.filter(card => card.getBoundingClientRect().top < window.innerHeight);
const isLoading = card => card.querySelector("mat-spinner") !== null;
return inSight.map(card => [
    card.querySelector("tb-truncated-path").title,
    isLoading(card) ? 0 : card.querySelectorAll("line-chart .series-view > svg path").length,
]);
"""

OPEN_CARD_MENU = """
document.querySelectorAll('scalar-card button[aria-label="More line chart options"]')[arguments[0]].click();
"""
TOGGLE_LOG_SCALE = """
const item = document.querySelector('[role=menu] button[aria-label^="Toggle Y-axis log scale"]');
item?.click();
return item !== null;
"""
# What a page shows, through its elements' shadow roots: words, pictures that have arrived, lines of charts.
PAGE_STATE = """
const words = [], images = [];
let lines = 0;
const visit = root => {
    for (const node of root.childNodes) {
        if (node.nodeType === Node.TEXT_NODE && node.data.trim()) words.push(node.data.trim());
        if (node.nodeType !== Node.ELEMENT_NODE) continue;
        if (["STYLE", "SCRIPT", "NOSCRIPT"].includes(node.tagName)) continue;
        if (node.tagName === "IMG" && node.naturalWidth > 1) images.push(node.naturalWidth);
        if (node.tagName === "path" && node.getAttribute("d")) lines += 1;
        if (node.shadowRoot) visit(node.shadowRoot);
        visit(node);
    }
};
visit(document.body);
return {text: words.join(" "), images: images, lines: lines};
"""
SHOW_ACTUAL_SIZE = """
const visit = root => [...root.querySelectorAll("*")].some(node => {
    const isIt = node.tagName === "PAPER-CHECKBOX" && node.textContent.includes("actual image size");
    if (isIt) node.click();
    return isIt || (node.shadowRoot && visit(node.shadowRoot));
});
return visit(document);
"""
MENU_IS_CLOSED = "return document.querySelector('[role=menu]') === null"
DROP_FOCUS = "document.activeElement.blur()"


@contextlib.contextmanager
def serve_tensorboard(run_dir: Path) -> Iterator[str]:
    """Run a TensorBoard server on `run_dir`; yield its address once it lists the directory's runs.

    Raises:
        RuntimeError: the server ended, or found no run in time; the message ends with the server's own words.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        run_dir,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            deadline = time.monotonic() + TIMEOUT
            while not _list_runs(address):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"TensorBoard shows no run of {run_dir}. It said:\n{log.read()}")
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()


def _list_runs(address: str) -> list[str]:
    try:
        with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
            return json.load(answer)
    except (urllib.error.URLError, TimeoutError, ConnectionError):  # not listening yet
        return []


@contextlib.contextmanager
def _browser(width: int, height: int) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise RuntimeError(
            "needs `chromium` and `chromedriver` on the PATH (Debian: chromium, chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*BROWSER_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            # The window's size would count its frame too.
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            store = f"localStorage.setItem('_tb_global_settings', {json.dumps(json.dumps(SETTINGS))})"
            browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": store})
            yield browser
        finally:
            browser.quit()


def _wait_until_drawn(browser: webdriver.Chrome) -> dict[str, int]:
    """Wait until every card in sight has its lines and no more arrive; return {tag: number of lines}."""
    last: dict[str, int] = {}

    def is_drawn(browser: webdriver.Chrome) -> bool:
        nonlocal last
        previous, last = last, dict(browser.execute_script(LINES_IN_SIGHT))
        return bool(last) and all(last.values()) and last == previous

    WebDriverWait(browser, TIMEOUT, poll_frequency=1.0).until(
        is_drawn, "no card matches, or not all were drawn"
    )
    return last


def screenshot(
    address: str,
    path: Path,
    *,
    tags: str = "",
    runs: str = "",
    log_scale: bool = True,
    width: int = 1600,
    height: int = 840,
) -> dict[str, int]:
    """Write a PNG of the time-series page of the TensorBoard server at `address`.

    Args:
        address: Of the server, as `serve_tensorboard` yields it.
        path: PNG file to write.
        tags: Regular expression that picks the cards.
        runs: Regular expression that picks the runs.
        log_scale: Whether the y-axes are logarithmic.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels; the default holds two rows of cards. Cards below it are left out.

    Returns:
        The tag of each card in the picture and how many lines it has, once all are drawn.

    Raises:
        RuntimeError: no Chromium or no driver for it.
        selenium.common.TimeoutException: nothing matches, or the page was never drawn.
    """
    # Lines as SVG, not WebGL, are part of the document: that they are drawn can be seen from here.
    query = urlencode({"tagFilter": tags, "runFilter": runs, "smoothing": 0, "forceSVG": "true"})
    with _browser(width, height) as browser:
        browser.get(f"{address}/?{query}#timeseries")
        lines = _wait_until_drawn(browser)
        for card in range(len(lines) if log_scale else 0):
            browser.execute_script(OPEN_CARD_MENU, card)
            WebDriverWait(browser, TIMEOUT).until(lambda browser: browser.execute_script(TOGGLE_LOG_SCALE))
            WebDriverWait(browser, TIMEOUT).until(lambda browser: browser.execute_script(MENU_IS_CLOSED))
        browser.execute_script(DROP_FOCUS)
        lines = _wait_until_drawn(browser)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(browser.get_screenshot_as_png())
    return lines


def photograph(
    address: str,
    path: Path,
    page: str,
    *,
    tags: str = "",
    runs: str = "",
    is_dark: bool = False,
    width: int = 1600,
    height: int = 840,
) -> dict[str, Any]:
    """Write a PNG of one of the other pages of the TensorBoard server at `address`.

    Args:
        address: Of the server, as `serve_tensorboard` yields it.
        path: PNG file to write.
        page: "custom_scalars", "images" (at their actual size), "text", "distributions" or "hparams".
        tags: Regular expression that picks the cards.
        runs: Regular expression that picks the runs.
        is_dark: Whether to take TensorBoard's dark theme.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.

    Returns:
        What the page shows: its "text", the widths of its "images", how many "lines" its charts have.

    Raises:
        RuntimeError: no Chromium or no driver for it.
        selenium.common.TimeoutException: the page did not come to rest.
    """
    query = urlencode({"darkMode": "true"} if is_dark else {})
    fragment = urlencode({"tagFilter": tags, "regexInput": runs, "_smoothingWeight": 0})
    states: list[dict[str, Any]] = []

    def is_at_rest(browser: webdriver.Chrome) -> bool:
        states.append(browser.execute_script(PAGE_STATE))
        return len(states) > 4 and all(state == states[-1] for state in states[-4:])

    with _browser(width, height) as browser:
        browser.get(f"{address}/?{query}#{page}&{fragment}")
        wait = WebDriverWait(browser, TIMEOUT, poll_frequency=1.0)
        wait.until(is_at_rest, "the page did not come to rest")
        if page == "images":
            browser.execute_script(SHOW_ACTUAL_SIZE)
            states.clear()
            wait.until(is_at_rest, "the page did not come to rest")
        browser.execute_script(DROP_FOCUS)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(browser.get_screenshot_as_png())
    return states[-1]


DOCS_PICTURES: dict[str, dict[str, Any]] = {
    "overview": {"page": "custom_scalars", "height": 790},
    "overview_dark": {"page": "custom_scalars", "height": 790, "is_dark": True},
    "heat_map": {"page": "images", "tags": "grad_norm", "runs": "x-lr3", "height": 1220},
    "alerts": {"page": "text", "tags": "alerts", "height": 560},
    "hparams": {"page": "hparams", "height": 420},
}


def main() -> None:
    """Parse the command line, serve the run directory and take the picture."""
    parser = argparse.ArgumentParser(description="Photograph TensorBoard.")
    parser.add_argument(
        "run_dir", type=Path, help="directory with TensorBoard event files, searched recursively"
    )
    parser.add_argument("out", type=Path, help="PNG file to write, or a folder with --pages")
    parser.add_argument("--tags", default="", help="regular expression that picks the cards")
    parser.add_argument("--runs", default="", help="regular expression that picks the runs")
    parser.add_argument(
        "--pages", action="store_true", help="OUT is a folder: the pictures of docs/tensorboard.md"
    )
    parser.add_argument("--linear", action="store_true", help="linear y-axes (default: logarithmic)")
    parser.add_argument(
        "--width", type=int, default=1600, help="of the picture, in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--height", type=int, default=840, help="in pixels; 336 a row of cards (default: %(default)s)"
    )
    args = parser.parse_args()
    with serve_tensorboard(args.run_dir) as address:
        if args.pages:
            for name, arguments in DOCS_PICTURES.items():
                state = photograph(address, args.out / f"tensorboard_{name}.png", **arguments)
                print(f"{name}: {len(state['images'])} pictures, {state['lines']} lines")
            return
        lines = screenshot(
            address,
            args.out,
            tags=args.tags,
            runs=args.runs,
            log_scale=not args.linear,
            width=args.width,
            height=args.height,
        )
    for tag, count in lines.items():
        print(f"{tag}: {count} lines")


if __name__ == "__main__":
    main()
