"""docs/tutorial.md runs and tells the story that it tells.

It trains for most of a minute, so it is not among the pages of test_readme.py. Between machines its numbers
differ in the digits, and its text, the standard library's source, with the version of Python: output is
compared but for numbers and the names of layers, and what the page claims is asserted.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.test_readme import TUTORIAL, runnable_blocks


def shape(output: str) -> str:
    """An output with numbers and layers replaced by marks, and without an alert's onset and consequences."""
    output = re.sub(r" What followed: .*|, since step \d+", "", output)
    output = re.sub(r"\btransformer\.[\w.]+", "LAYER", output)
    output = re.sub(r"\b(nan|\d[\d,]*(\.\d+)?(e[+-]?\d+)?)\b", "N", output)
    return re.sub(r" +", " ", output).strip()


def test_only_numbers_and_layers_may_differ() -> None:
    assert shape("step   0  loss 5.39") == shape("step 135  loss 1.2e+05")
    assert shape("3 warning weight-jump transformer.h.0") != shape("3 warning loss-spike transformer.h.0")


@pytest.mark.slow
def test_it_tells_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for block in runnable_blocks(TUTORIAL.read_text(encoding="utf-8")):
        stdout = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.code, str(TUTORIAL), "exec")
        with contextlib.redirect_stdout(stdout), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, namespace)
        outputs.append(stdout.getvalue())
        if "runs/explodes" in block.code and "attach" in block.code:
            alerts = namespace["probe"].alerts
        # The lines of a training are as many as its steps, which differ.
        if block.expected is not None and "step   0" not in block.expected:
            assert shape(stdout.getvalue()) == shape(block.expected), block.line
    bare, watched, *_, mended = outputs
    assert watched == bare  # the probe changes nothing
    last = int(re.findall(r"step +(\d+)", bare)[-1])
    assert bare.rstrip().endswith("nan")
    assert alerts[0].step <= last - 30
    assert "nan" not in mended
    assert float(re.findall(r"loss ([\d.]+)", mended)[-1]) < 3.3
    assert "diverged: False" in mended
