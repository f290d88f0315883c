"""Vision models of timm and torchvision, where installed: training untouched, every attention found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probes
from tests.probes.test_zoo import train
from tests.probes.zoo.architectures import SDPA, SOFTMAX

pytestmark = pytest.mark.filterwarnings("ignore")

# name, arguments, attention calls in a forward pass, functions that compute them
TIMM: list[tuple[str, dict[str, Any], int, set[str]]] = [
    ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32, "patch_size": 8}, 2, {SDPA}),
    ("deit3_small_patch16_224", {"depth": 2, "img_size": 32, "patch_size": 8}, 2, {SDPA}),
    ("beit_base_patch16_224", {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 48}, 2, {SDPA}),
    ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 28}, 2, {SDPA}),
    ("cait_xxs24_224", {"depth": 2, "img_size": 32, "patch_size": 8}, 4, {SDPA, SOFTMAX}),
    (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1), "num_heads": (2, 4), "img_size": 56},
        2,
        {SDPA, SOFTMAX},
    ),
    ("vit_relpos_small_patch16_224", {"depth": 2, "img_size": 32, "patch_size": 8}, 2, {SDPA}),
    ("mixer_s32_224", {"img_size": 32}, 0, set()),
    ("convnext_atto", {"depths": (1, 1, 1, 1)}, 0, set()),
    ("resnet18", {}, 0, set()),
]


def torchvision_models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    swin = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    return {
        "VisionTransformer": (
            lambda: models.VisionTransformer(
                image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=32
            ),
            2,
        ),
        "SwinTransformer": (lambda: models.SwinTransformer(**swin, window_size=[4, 4]), 2),
        "resnet18": (lambda: models.resnet18(num_classes=10), 0),
        "convnext": (
            lambda: models.ConvNeXt(
                [models.convnext.CNBlockConfig(16, 32, 1), models.convnext.CNBlockConfig(32, None, 1)],
                num_classes=10,
            ),
            0,
        ),
    }


class FirstOutput(nn.Module):
    """The model as the zoo's training calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        return (self.model(pixels),)


def check(model: nn.Module, size: int, num_sites: int, functions: set[str]) -> None:
    torch.manual_seed(0)
    watched = FirstOutput(model).train()
    bare = copy.deepcopy(watched)
    batches = [{"pixels": torch.rand(2, 3, size, size)} for _ in range(5)]
    expected, _ = train(bare, batches, watched=False)
    trace, probe = train(watched, batches, watched=True, attention_every=1 if num_sites else None)
    assert all(map(torch.equal, trace, expected))
    assert probe is not None
    assert len(probe.attention_sites) == num_sites
    assert not any(site.unseen for site in probe.attention_sites)
    assert {site.kind for site in probe.attention_sites} <= functions
    measured = {(r.layer, r.call) for r in probe.records if r.quantity == "attention/entropy"}
    assert measured == {(site.layer, site.call) for site in probe.attention_sites}


@pytest.mark.parametrize(("name", "arguments", "num_sites", "functions"), TIMM, ids=[t[0] for t in TIMM])
def test_timm(name: str, arguments: dict[str, Any], num_sites: int, functions: set[str]) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments)
    check(model, arguments.get("img_size", 32), num_sites, functions)


@pytest.mark.parametrize("name", ["VisionTransformer", "SwinTransformer", "resnet18", "convnext"])
def test_torchvision(name: str) -> None:
    make, num_sites = torchvision_models()[name]
    torch.manual_seed(0)
    functions = {"VisionTransformer": {SDPA}, "SwinTransformer": {SOFTMAX}}.get(name, set())
    check(make(), 32, num_sites, functions)


def test_timm_by_hand_and_fused_measure_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    recorded = []
    for is_fused in (True, False):
        torch.manual_seed(0)
        monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", int(is_fused))
        model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8)
        with probes.attach(model, attention_every=1, attention_rows=None) as probe:
            model(torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).sum().backward()
            probe.step()
        assert {site.kind for site in probe.attention_sites} == {SDPA if is_fused else SOFTMAX}
        recorded.append([r for r in probe.records if r.quantity.startswith("attention/")])
    for fused, by_hand in zip(*recorded, strict=True):
        assert fused.series == by_hand.series
        assert fused.value == pytest.approx(by_hand.value, rel=1e-4, abs=1e-7)
