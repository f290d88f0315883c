"""Without a trainer's package, its integration says which extra brings it."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("huggingface", "transformers"),
        ("huggingface", "accelerate.optimizer"),
        ("lightning", "lightning.pytorch"),
    ],
)
def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.delitem(sys.modules, f"probes.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "stability-probes\[{name}\]"'):
        importlib.import_module(f"probes.integrations.{name}")
