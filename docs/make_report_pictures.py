"""Try the report as a new user would, and photograph it.

    PYTHONPATH=. python docs/make_report_pictures.py              # about two minutes on one CPU core
    PYTHONPATH=. python docs/make_report_pictures.py --block 3    # another layer

A causal language model of 12 blocks is trained twice; in the faulty run the query and key weights of one
block grow by 8 % a step. `python -m probes.report` tells of both runs. The headline of its page, and the
arrow in the heat map that a browser shows without scrolling, must name the layer, or this program ends with
status 1. The pictures, light and dark, go to docs/images.

Needs Chromium (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.attention_collapse import Fault, train
from experiments.token_transformer import TokenTransformerConfig

IMAGES = Path(__file__).parent / "images"
FIRST_SCREEN = (1280, 800)  # a small laptop's
TIMEOUT = 120.0  # seconds, for a page on a busy machine

# The words whose line ends above the bottom of the window, left behind in the document.
COLLECT_WORDS = """
<script>
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const inSight = [];
while (walker.nextNode()) {
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const box = range.getBoundingClientRect();
    const isShown = box.height > 0 && walker.currentNode.parentElement.tagName !== "SCRIPT";
    if (isShown && box.bottom <= window.innerHeight) inSight.push(walker.currentNode.textContent);
}
const seen = document.createElement("pre");
seen.id = "in-sight";
seen.textContent = inSight.join("\\n");
document.body.append(seen);
</script>
"""


def record(
    log_dir: Path, *, block: int | None, steps: int = 120, embed_dim: int = 64, tokens: int = 64
) -> None:
    """Train 12 blocks with a probe attached, as a user would.

    Args:
        log_dir: Of the probe.
        block: Whose query and key weights grow from the middle of the run on; None: a sound run.
        steps: Optimizer steps.
        embed_dim: Width of the model.
        tokens: Length of a sequence.
    """
    config = TokenTransformerConfig(vocabulary=64, max_tokens=tokens, embed_dim=embed_dim, num_layers=12)
    fault = None if block is None else Fault(step=steps // 2, block=block, growth=1.08)
    train(config, steps=steps, chains=2, seed=0, attention_every=2, fault=fault, log_dir=log_dir)


def run_report(run_dir: Path, *others: Path, out: Path) -> str:
    """Run `python -m probes.report`; return what it says on the terminal.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "probes.report", run_dir, "--out", out]
    if others:
        command += ["--compare", *others]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def lines_in_sight(page: Path) -> list[str]:
    """The texts that a browser shows of a page without scrolling, from the top."""
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder) / "page.html"
        text = page.read_text(encoding="utf-8")
        probed.write_text(text.replace("</body>", f"{COLLECT_WORDS}</body>"), encoding="utf-8")
        document = _chromium(probed, FIRST_SCREEN, "--dump-dom")
    found = re.search(r'<pre id="in-sight">(.*?)</pre>', document, re.DOTALL)
    if found is None:
        raise RuntimeError(f"Chromium did not run the script in {page}.")
    return html.unescape(found[1]).splitlines()


def names_layer(in_sight: list[str], layer: str) -> bool:
    """Whether the headline names the layer, and the one arrow in the heat map points at it."""
    pointed = [line for line in in_sight if line.endswith("▶")]
    return f"in {layer}" in in_sight[0] and len(pointed) == 1 and pointed[0].startswith(layer)


def photograph(page: Path, picture: Path, *, dark: bool, size: tuple[int, int] = FIRST_SCREEN) -> None:
    """Write a PNG of the page's first `size` pixels."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    scheme = 0 if dark else 1
    _chromium(
        page,
        size,
        f"--screenshot={picture.absolute()}",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--hide-scrollbars",
    )


def _chromium(page: Path, size: tuple[int, int], *flags: str) -> str:
    program = shutil.which("chromium")
    if program is None:
        raise RuntimeError("needs `chromium` on the PATH (Debian: apt-get install chromium)")
    window = f"--window-size={size[0]},{size[1]}"
    # --no-sandbox: Chromium refuses to start as root with it.
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", window, *flags]
    return subprocess.run(
        [*command, page.absolute().as_uri()], check=True, capture_output=True, text=True, timeout=TIMEOUT
    ).stdout


def main() -> int:
    """Train, report, look, and photograph."""
    parser = argparse.ArgumentParser(description="Try the report as a new user would, and photograph it.")
    parser.add_argument("--block", type=int, default=7, choices=range(12), help="at fault (default 7)")
    parser.add_argument("--runs", type=Path, default=Path("runs/report-trial"), help="where the runs go")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where the pictures go")
    options = parser.parse_args()
    faulty, clean = options.runs / "faulty", options.runs / "clean"
    record(faulty, block=options.block)
    record(clean, block=None)
    page, both = faulty / "report.html", options.runs / "both.html"
    print(run_report(faulty, out=page))
    run_report(faulty, clean, out=both)
    for name, shown, size in (("report", page, FIRST_SCREEN), ("report_compare", both, (1280, 1500))):
        for dark in (False, True):
            picture = options.images / f"{name}{'_dark' if dark else ''}.png"
            photograph(shown, picture, dark=dark, size=size)
    shutil.copy(faulty / "report-attention-entropy.png", options.images / "report_entropy.png")
    layer = f"blocks.{options.block}.attention"
    in_sight = lines_in_sight(page)
    is_named = names_layer(in_sight, layer)
    print(f"Headline: {in_sight[0]}. The first screen {'names' if is_named else 'does not name'} {layer}.")
    return 0 if is_named else 1


if __name__ == "__main__":
    sys.exit(main())
