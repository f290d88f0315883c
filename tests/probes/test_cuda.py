"""On a GPU: nothing in the step waits for the device, and training is bitwise what it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import probes
from experiments.cell_transformer import CellTransformer, CellTransformerConfig
from probes.record import Series
from tests.probes.models import transformer_encoder

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error::probes.ProbeWarning")]


def train(attention: str, *, is_watched: bool, sync_mode: str = "default") -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = CellTransformerConfig.preset("tiny", num_genes=64, attention=attention)
    model = CellTransformer(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    genes = torch.arange(48, device="cuda").expand(2, 48)
    mask = torch.arange(48, device="cuda").expand(2, 48) % 4 == 0
    lengths = torch.tensor([48, 31], device="cuda")
    probe = probes.attach(model, optimizer, attention_every=2, attention_rows=8) if is_watched else None
    for step in range(8):
        if step == 2:  # the first steps fill caches and allocate pinned memory
            torch.cuda.set_sync_debug_mode(sync_mode)
        values = torch.rand(2, 48, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            predictions = model(genes, values, mask, lengths)
        loss = (predictions - values).square().mean()
        if probe is not None:
            probe.log(loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    if probe is not None:
        probe.close()
        assert {record.step for record in probe.records} == set(range(8))
    return model.state_dict()


@pytest.mark.parametrize("attention", ["softmax", "sigmoid"])
def test_no_synchronising_call_in_a_watched_step(attention: str) -> None:
    try:
        train(attention, is_watched=True, sync_mode="error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["softmax", "sigmoid"])
def test_parameters_are_bitwise_equal_with_and_without(attention: str) -> None:
    bare, watched = train(attention, is_watched=False), train(attention, is_watched=True)
    for key, tensor in bare.items():
        assert torch.equal(tensor, watched[key]), key


def test_values_on_the_gpu_are_those_on_the_cpu() -> None:
    def records(device: str) -> dict[Series, float]:
        torch.manual_seed(0)
        model = transformer_encoder().eval().to(device)
        x = torch.rand(2, 6, 32, generator=torch.Generator().manual_seed(1)).to(device)
        with probes.attach(model, attention_every=1, layer_jacobian_every=1) as probe:
            model(x).square().sum().backward()
            probe.step()
        # The two devices' generators draw different probe vectors for the layer Jacobian's estimate.
        return {r.series: r.value for r in probe.records if r.quantity != "layer_jacobian/frobenius"}

    on_cpu, on_gpu = records("cpu"), records("cuda")
    assert on_cpu.keys() == on_gpu.keys()
    for key, value in on_cpu.items():
        assert on_gpu[key] == pytest.approx(value, rel=2e-3, abs=1e-6), key


@pytest.mark.parametrize("is_mixed", [False, True])
def test_adams_updates_are_those_on_the_cpu_where_the_gpu_counts_steps(is_mixed: bool) -> None:
    def records(device: str) -> dict[tuple[int, Series], float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)
        groups = [
            {"params": model[0].parameters(), "betas": (0.9, 0.99)},
            {"params": model[1].parameters(), "capturable": device == "cuda" and not is_mixed},
        ]
        groups[0]["capturable"] = device == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        x = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).to(device)
        with probes.attach(model, optimizer, details_every=1) as probe:
            for _ in range(3):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
        names = ("update_ratio", "adam_update_rms", "grad_max_abs", "nonfinite_count")
        return {(r.step, r.series): r.value for r in probe.records if r.quantity in names}

    on_cpu, on_gpu = records("cpu"), records("cuda")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert len(on_cpu) == 3 * 4 * 2
