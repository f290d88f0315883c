"""What a step costs the host: how many operations are launched, for however many parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import probes
from probes.optimizer_state import OptimizerState
from probes.parameter_gradients import WatchedParameters, measure_gradients, measure_weights
from probes.pending import Pending
from probes.sharding import Sharding


class Launches(TorchDispatchMode):
    """Counts operations; a fused one counts once, even where CUDA may compute it tensor by tensor.

    It does so for 0-norms and for tensors as divisors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, function: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.number += function.namespace == "aten"  # not a question for the device of a tensor
        return function(*args, **(kwargs or {}))


def launches_around_a_step(num_layers: int, *, steps_on_device: bool) -> dict[str, int]:
    """Of what is measured around AdamW's step on a GPU, which needs none here: its tensors hold no values."""
    numbers = {}
    with FakeTensorMode():
        parameters = [
            nn.Parameter(torch.empty(shape, device="cuda"))
            for _ in range(num_layers)
            for shape in ([8, 4], [8])
        ]
        optimizer = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
            step = torch.ones((), device="cuda") if steps_on_device else 1.0
            optimizer.state[parameter] = {"step": step, "exp_avg_sq": torch.empty_like(parameter)}
        layer_of = {parameter: f"layers.{index // 2}" for index, parameter in enumerate(parameters)}
        watched = WatchedParameters(layer_of, set(layer_of.values())).among(parameters)
        sharding, pending = Sharding(), Pending()
        gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        parts, weights = sharding.parts_and_weights(list(gradients.values()))
        state = OptimizerState(sharding)
        for name, measure in {
            "gradients": lambda: measure_gradients(pending, watched, parts, weights, is_detailed=False),
            "gradients in detail": lambda: measure_gradients(
                pending, watched, parts, weights, is_detailed=True
            ),
            "weights": lambda: measure_weights(pending, watched, sharding),
            "before": lambda: state.before(watched),
            "after": lambda: state.after(pending, optimizer, gradients),
        }.items():
            with Launches() as launches:
                measure()
            numbers[name] = launches.number
        assert pending.has("_adam_update_norm")
    return numbers


@pytest.mark.parametrize("steps_on_device", [False, True])
def test_around_the_optimizers_step_their_number_is_the_same_for_every_model(steps_on_device: bool) -> None:
    few = launches_around_a_step(2, steps_on_device=steps_on_device)
    assert launches_around_a_step(100, steps_on_device=steps_on_device) == few
    assert few["gradients"] == few["weights"] == 2
    assert few["gradients in detail"] <= 8
    assert few["before"] == 1
    assert few["after"] <= (13 if steps_on_device else 9)


def launches_of_a_step(num_layers: int, *, details_every: int | None) -> int:
    """Of a whole step on the CPU, the optimizer's apart; None: without probes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
    probe = None
    if details_every is not None:
        probe = probes.attach(model, optimizer, activations_every=0, details_every=details_every)
    x = torch.rand(2, 4)

    def step() -> Tensor:
        model(x).sum().backward()
        optimizer.step()

    step()
    with Launches() as launches:
        step()
    if probe is not None:
        probe.close()
    return launches.number


@pytest.mark.parametrize(("details_every", "most", "most_per_layer"), [(0, 10, 0), (1, 28, 12)])
def test_a_step_launches_few_for_each_layer(details_every: int, most: int, most_per_layer: int) -> None:
    def added(num_layers: int) -> int:
        bare = launches_of_a_step(num_layers, details_every=None)
        return launches_of_a_step(num_layers, details_every=details_every) - bare

    few, many = added(2), added(12)
    assert many - few <= 10 * most_per_layer
    assert few - 2 * most_per_layer <= most
