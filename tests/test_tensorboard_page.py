"""What a probe writes stands on the page of a real TensorBoard server, in a real browser."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import probes

pytest.importorskip("selenium")

ROOT = Path(__file__).parent.parent
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs `chromium` and `chromedriver` on the PATH (Debian: chromium, chromium-driver)",
    ),
]


def test_tensorboard_draws_a_card_per_layer(tmp_path: Path) -> None:
    screenshots = runpy.run_path(str(ROOT / "docs" / "make_screenshots.py"))
    for name in ("first", "second"):
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with probes.attach(model, optimizer, log_dir=tmp_path / "runs" / name):
            for _ in range(5):
                model(torch.randn(16, 4)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    picture = tmp_path / "page.png"
    with screenshots["serve_tensorboard"](tmp_path / "runs") as address:
        lines = screenshots["screenshot"](address, picture, tags="^grad_norm/", runs="first|second")

    assert lines["grad_norm/0"] == lines["grad_norm/2"] == 2  # one line a run
    assert picture.read_bytes().startswith(PNG_SIGNATURE)


def test_server_without_runs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screenshots = runpy.run_path(str(ROOT / "docs" / "make_screenshots.py"))
    serve = screenshots["serve_tensorboard"]
    monkeypatch.setitem(serve.__wrapped__.__globals__, "TIMEOUT", 5.0)
    with pytest.raises(RuntimeError, match="shows no run of"), serve(tmp_path):
        pass
