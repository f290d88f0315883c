"""What is recorded is what a person would compute by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import probes
import stability
from probes.record import Record
from stability.attention.statistics import attention_statistics
from tests.probes.models import (
    SecondHalf,
    SelfAttention,
    inplace_cnn,
    torch_attention,
    transformer_encoder,
)
from tests.probes.recorded import values_of

pytestmark = pytest.mark.filterwarnings("error::probes.ProbeWarning")


def test_a_linear_model_against_derivatives_by_hand() -> None:
    # y = w x with w = (3, 4), x = (1, 2), loss = y: dloss/dw = x, dloss/dy = 1, dloss/dx = w.
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[3.0, 4.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    with probes.attach(model, optimizer) as probe:
        loss = model(x).sum()
        probe.log(loss=loss)
        loss.backward()
        optimizer.step()
    expected = {
        "grad_norm": math.sqrt(5),
        "grad_max_abs": 2.0,
        "nonfinite_count": 0.0,
        "weight_norm": 5.0,
        "update_ratio": 0.1 * math.sqrt(5) / 5,
        "activation_rms": 11.0,
        "activation_max_abs": 11.0,
        "activation_grad_norm": 1.0,
        "gradient_gain": 5.0,
    }
    for quantity, value in expected.items():
        assert values_of(probe, quantity, "1") == [pytest.approx(value, rel=1e-6)], quantity
    assert values_of(probe, "grad_norm", "(all)") == [pytest.approx(math.sqrt(5))]
    assert values_of(probe, "loss", "(all)") == [11.0]
    assert not values_of(probe, "adam_update_rms", "1")  # SGD has no second moment


def test_gradients_at_inplace_layers_are_those_before_the_change() -> None:
    model = inplace_cnn()
    with probes.attach(model) as probe:
        model(torch.rand(2, 3, 8, 8)).square().sum().backward()
        probe.step()
    torch.manual_seed(0)
    for layer, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            gain = values_of(probe, "gradient_gain", layer)
            assert len(gain) == 1
            assert 0 < gain[0] < 1  # a ReLU only removes entries of the gradient


def test_gradient_gain_telescopes_along_a_chain() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    with probes.attach(model) as probe:
        model(torch.rand(3, 6)).sum().backward()
        probe.step()
    norms = [values_of(probe, "activation_grad_norm", str(i))[0] for i in range(4)]
    for i in (1, 2, 3):
        assert values_of(probe, "gradient_gain", str(i)) == [pytest.approx(norms[i - 1] / norms[i])]


def test_an_output_that_the_loss_does_not_depend_on_costs_no_other_gradient() -> None:
    model = SecondHalf()
    with probes.attach(model) as probe:
        for _ in range(2):
            model(torch.ones(3, 2)).sum().backward()
            probe.step()
    assert values_of(probe, "activation_grad_norm", "both") == []
    assert values_of(probe, "activation_grad_norm", "last") == [pytest.approx(math.sqrt(6))]


def test_extreme_gradients_neither_overflow_nor_vanish() -> None:
    model = nn.Linear(4, 1, bias=False)
    with probes.attach(model) as probe:
        for scale in (1e25, 1e-30):
            (model(torch.ones(1, 4)) * scale).sum().backward()
            probe.step()
            model.zero_grad()
    assert values_of(probe, "grad_norm", "(root)") == [pytest.approx(2e25), pytest.approx(2e-30)]


def test_nonfinite_gradients_are_counted_and_kept() -> None:
    model = nn.Linear(4, 1)
    x = torch.tensor([[1.0, math.nan, math.inf, 2.0]])
    with pytest.warns(probes.DivergenceWarning), probes.attach(model) as probe:
        model(x).sum().backward()
        probe.step()
        probe.step()
    assert values_of(probe, "nonfinite_count", "(root)")[0] == 2
    assert math.isnan(values_of(probe, "grad_norm", "(root)")[0])


def test_nonfinite_float64_gradients_are_counted_too() -> None:
    model = nn.Linear(2, 1).double()
    with pytest.warns(probes.DivergenceWarning), probes.attach(model) as probe:
        model(torch.tensor([[1.0, math.nan]], dtype=torch.float64)).sum().backward()
        probe.step()
    assert values_of(probe, "nonfinite_count", "(root)") == [1.0]


def test_accumulated_forward_passes_make_one_record_per_step() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.rand(3, 4), 2 * torch.rand(3, 4)]
    rms = [model[0](batch).square().mean().item() for batch in batches]
    with probes.attach(model, optimizer) as probe:
        for batch in batches:
            loss = model(batch).sum()
            probe.log(loss=loss)
            loss.backward()
        total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        optimizer.step()
    assert values_of(probe, "activation_rms", "0") == [pytest.approx(math.sqrt(sum(rms) / 2))]
    assert values_of(probe, "grad_norm", "(all)") == [pytest.approx(total)]
    assert len(values_of(probe, "loss", "(all)")) == 1


def test_a_weight_that_an_optimizer_lists_twice_counts_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD([model[0].weight, model[1].weight], lr=0.1)
    with probes.attach(model, optimizer) as probe:
        model(torch.ones(2, 3)).square().sum().backward()
        weight, gradient = model[0].weight.detach().norm(), model[0].weight.grad.norm()
        optimizer.step()
    records = {record.quantity: record.value for record in probe.records if record.layer == "0"}
    assert records["grad_norm"] == pytest.approx(gradient.item())
    assert records["weight_norm"] == pytest.approx(weight.item())


def test_a_shared_module_has_one_record_per_call_and_one_gradient() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    with probes.attach(model) as probe:
        model(torch.rand(2, 4)).sum().backward()
        probe.step()
    assert len(values_of(probe, "activation_rms", "0", call=0)) == 1
    assert len(values_of(probe, "activation_rms", "0", call=1)) == 1
    assert len(values_of(probe, "grad_norm", "0")) == 1


def test_sparse_gradients_are_measured() -> None:
    model = nn.Embedding(10, 3, sparse=True)
    with probes.attach(model) as probe:
        model(torch.tensor([1, 1, 4])).sum().backward()
        probe.step()
    assert values_of(probe, "grad_norm", "(root)") == [pytest.approx(math.sqrt(3 * 4 + 3 * 1))]


def test_gradients_under_a_scaler_are_unscaled_ones() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with probes.attach(model, optimizer) as probe:
        scaler.scale(model(torch.tensor([[3.0, 4.0]])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert values_of(probe, "grad_norm", "(root)") == [5.0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_are_counted_once(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, use_reentrant: bool) -> None:
            super().__init__()
            self.inner = SelfAttention(torch_attention)
            self.use_reentrant = use_reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)

    model = Checkpointed(use_reentrant)
    with probes.attach(model, attention_every=1) as probe:
        model(torch.rand(2, 5, 16, requires_grad=True)).sum().backward()
        probe.step()
    for quantity, layer in (("attention/entropy", "inner"), ("activation_rms", "inner.projection")):
        assert [
            r.call for r in probe.records if (r.quantity, r.layer, r.head) == (quantity, layer, None)
        ] == [0]


@pytest.mark.parametrize(
    "attention",
    [torch_attention, stability.softmax_attention, stability.sigmoid_attention],
    ids=["torch", "softmax", "sigmoid"],
)
def test_attention_statistics_are_those_of_the_call(attention: Callable[..., Tensor]) -> None:
    calls = []

    def spy(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append((query.detach(), key.detach()))
        return attention(query, key, value)

    model = SelfAttention(spy)
    with probes.attach(model, attention_every=1, attention_rows=None) as probe:
        model(torch.rand(2, 9, 16)).sum().backward()
        probe.step()
    mechanism = "sigmoid" if attention is stability.sigmoid_attention else "softmax"
    summary = attention_statistics(*calls[0], mechanism=mechanism).summarize()
    assert {"max_logit", "entropy", "jacobian_frobenius", "jacobian_spectral"} < set(summary)
    for name, expected in summary.items():
        assert values_of(probe, f"attention/{name}", "(root)") == [pytest.approx(expected.value.item())]
        for head in (0, 1):
            recorded = values_of(probe, f"attention/{name}", "(root)", head=head)
            assert recorded == [pytest.approx(expected.per_head[head].item())]
    (site,) = probe.attention_sites
    assert (site.layer, site.mechanism, site.num_heads) == ("(root)", mechanism, 2)


def test_sampled_attention_rows_are_labelled_and_have_an_error() -> None:
    model = SelfAttention(stability.softmax_attention)
    with probes.attach(model, attention_every=1, attention_rows=4) as probe:
        model(torch.rand(2, 50, 16)).sum().backward()
        probe.step()
    kinds = {record.quantity: record for record in probe.records if record.head is None}
    assert kinds["attention/entropy"].kind == "estimate"
    assert kinds["attention/entropy"].standard_error > 0
    assert kinds["attention/max_logit"].kind == "lower_bound"
    assert kinds["attention/jacobian_spectral"].kind == "upper_bound"


def test_attention_in_transformer_encoder_is_found_layer_by_layer() -> None:
    model = transformer_encoder()
    with probes.attach(model, attention_every=1) as probe:
        model(torch.rand(2, 5, 32)).sum().backward()
        probe.step()
    assert [site.layer for site in probe.attention_sites] == ["0.layers.0.self_attn", "0.layers.1.self_attn"]


def test_validation_between_steps_is_not_recorded() -> None:
    model = transformer_encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run(*, validates: bool) -> list[Record]:
        torch.manual_seed(0)
        model.load_state_dict(initial)
        with probes.attach(model, optimizer, attention_every=1) as probe:
            for _ in range(2):
                loss = model(torch.rand(2, 5, 32)).sum()
                if validates:
                    with torch.no_grad():
                        model.eval()
                        model(torch.full((2, 7, 32), 100.0))
                        model.train()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return probe.records

    initial = {key: value.clone() for key, value in model.state_dict().items()}
    assert run(validates=False) == run(validates=True)


def test_two_optimizers_make_one_step() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    with probes.attach(model, optimizers) as probe:
        for _ in range(2):
            model(torch.rand(2, 4)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert [r.step for r in probe.records if r.quantity == "grad_norm" and r.layer == "(all)"] == [0, 1]
    assert {r.layer for r in probe.records if r.quantity == "weight_norm"} == {"0", "1"}


def test_a_closure_is_measured_after_it_ran() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.tensor([[3.0, 4.0]])).sum()
        loss.backward()
        return loss

    with probes.attach(model, optimizer) as probe:
        optimizer.step(closure)
    assert values_of(probe, "grad_norm", "(root)") == [5.0]


@pytest.mark.parametrize("is_attention", [True, False])
def test_required_attention_may_come_within_a_closure(is_attention: bool) -> None:
    model = nn.MultiheadAttention(8, 2) if is_attention else nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        inputs = torch.rand(3, 8)
        loss = model(inputs, inputs, inputs)[0].sum() if is_attention else model(inputs).sum()
        loss.backward()
        return loss

    with probes.attach(model, optimizer, attention_every=1) as probe:
        if is_attention:
            optimizer.step(closure)
        else:
            with pytest.raises(ValueError, match="no attention call"):
                optimizer.step(closure)
    assert bool(probe.attention_sites) == is_attention


def test_every_thins_and_the_layer_filter_selects() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with probes.attach(model, every=3, layers="1") as probe:
        for _ in range(7):
            model(torch.rand(2, 4)).sum().backward()
            probe.step()
    assert {record.step for record in probe.records} == {0, 3, 6}
    assert {record.layer for record in probe.records} == {"1", "(all)"}


def test_layer_jacobians_carry_their_errors() -> None:
    model = SelfAttention(stability.sigmoid_attention)
    with probes.attach(model, layer_jacobian_every=2) as probe:
        for _ in range(3):
            model(torch.rand(1, 6, 16)).sum().backward()
            probe.step()
    spectral = [r for r in probe.records if r.quantity == "layer_jacobian/spectral"]
    frobenius = [r for r in probe.records if r.quantity == "layer_jacobian/frobenius"]
    assert [r.step for r in spectral] == [0, 2]
    assert all(r.kind == "lower_bound" and r.value > 0 for r in spectral)
    assert all(r.kind == "estimate" and r.standard_error > 0 for r in frobenius)
