"""The faults: what goes wrong in a training, in which layer, from which step on.

A fault draws from its own generator, so that a run and its fault-free pair see the same batches and the same
dropout. It acts at one of three moments of a step: on the batch, on the model and optimizer before the
forward pass, on the gradients before the optimizer's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.detection_layers import query_and_key, weight_of
from experiments.detection_models import Batch


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: A key of `KINDS`.
        variant: Which form of it; see there.
        strength: Its size; what it measures depends on the kind.
        layer: Name of the module it sits in, or None where it is no layer's.
        step: First step it touches, from 0.
        seed: Of its draws.
    """

    kind: str
    variant: str
    strength: float
    layer: str | None
    step: int
    seed: int = 0


class Injector:
    """Carries one fault into a training, or none.

    Args:
        fault: What goes wrong; None: nothing does.
        model: The model.
        optimizer: Its optimizer, after its learning rate was set for the step.
    """

    def __init__(self, fault: Fault | None, model: nn.Module, optimizer: Optimizer) -> None:
        self.fault = fault
        self.model = model
        self.optimizer = optimizer
        self.generator = torch.Generator().manual_seed(0 if fault is None else fault.seed)

    @property
    def layer(self) -> nn.Module:
        """The faulty module."""
        assert self.fault is not None
        assert self.fault.layer is not None
        return self.model.get_submodule(self.fault.layer)

    @torch.no_grad()
    def before_forward(self, step: int, batch: Batch) -> Batch:
        """Damages batch, weights or optimizer as the fault wants at this step.

        Args:
            step: The step that begins.
            batch: Its data.

        Returns:
            The data to train on.
        """
        fault = self.fault
        if fault is None or step < fault.step:
            return batch
        kind = KINDS[fault.kind]
        if kind.moment == "batch":
            return kind.apply(self, fault, step - fault.step, batch)
        if kind.moment == "model":
            kind.apply(self, fault, step - fault.step)
        return batch

    @torch.no_grad()
    def before_optimizer(self, step: int) -> None:
        """Damages the gradients as the fault wants at this step."""
        fault = self.fault
        if fault is not None and step >= fault.step and KINDS[fault.kind].moment == "gradient":
            KINDS[fault.kind].apply(self, fault, step - fault.step)


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        moment: When in a step it acts: on the "batch", on the "model" (and optimizer), on the "gradient".
        sits_in: Any layer with a "weight" matrix, "attention", what a "relu" follows; None: nowhere.
        is_slow: Whether it sharpens attention little by little, long before the loss shows it.
        apply: Carries it out: injector, fault, steps since its onset, and the batch if that is its moment.
    """

    moment: str
    sits_in: str | None
    is_slow: bool
    apply: Callable


def _spoil_one(tensor: Tensor, injector: Injector, fault: Fault) -> None:
    index = int(torch.randint(tensor.numel(), (), generator=injector.generator))
    tensor.view(-1)[index] = math.nan if fault.variant == "nan" else math.inf


def nonfinite_weight(injector: Injector, fault: Fault, since: int) -> None:
    """One entry of a layer's weights becomes NaN or infinite, once."""
    if since == 0:
        _spoil_one(weight_of(injector.layer), injector, fault)


def nonfinite_gradient(injector: Injector, fault: Fault, since: int) -> None:
    """One entry of a layer's gradient becomes NaN or infinite, once, before the optimizer steps."""
    gradient = weight_of(injector.layer).grad
    if since == 0 and gradient is not None:
        _spoil_one(gradient, injector, fault)


def nonfinite_batch(injector: Injector, fault: Fault, since: int, batch: Batch) -> Batch:
    """The values of one sample become NaN or infinite, once."""
    if since:
        return batch
    inputs = batch.inputs.clone()
    inputs[0] = math.nan if fault.variant == "nan" else math.inf
    return batch._replace(inputs=inputs)


def scale_weights(injector: Injector, fault: Fault, since: int) -> None:
    """All parameters of a layer are multiplied by `strength`, once."""
    if since == 0:
        for parameter in injector.layer.parameters(recurse=False):
            parameter.mul_(fault.strength)


def grow_query_and_key(injector: Injector, fault: Fault, since: int) -> None:
    """Query and key weights of an attention layer are multiplied by `strength` at every step."""
    for weight, _ in query_and_key(injector.layer):
        weight.mul_(fault.strength)


def sharpen_attention(injector: Injector, fault: Fault, since: int) -> None:
    """Weights and bias of one projection, "query" or "key", are multiplied by `strength` at every step."""
    query, key = query_and_key(injector.layer)
    for tensor in query if fault.variant == "query" else key:
        tensor.mul_(fault.strength)


def saturate(injector: Injector, fault: Fault, since: int) -> None:
    """At every step query and key biases + `strength` ("bias") or their weights × `strength` ("growth")."""
    for weight, bias in query_and_key(injector.layer):
        if fault.variant == "bias":
            bias.add_(fault.strength)
        else:
            weight.mul_(fault.strength)


def raise_learning_rate(injector: Injector, fault: Fault, since: int) -> None:
    """The learning rate is `strength` times what the schedule says, from now on."""
    for group in injector.optimizer.param_groups:
        group["lr"] *= fault.strength


def bad_batch(injector: Injector, fault: Fault, since: int, batch: Batch) -> Batch:
    """One batch of rubbish: outliers in a quarter of the samples, or tokens that are all drawn at random.

    Outliers are noise of standard deviation `strength` as inputs; targets that are numbers are × `strength`.
    """
    if since:
        return batch
    if not batch.inputs.is_floating_point():
        vocabulary = int(max(batch.inputs.max(), batch.targets.max())) + 1
        draw = torch.randint(vocabulary, (*batch.inputs.shape, 2), generator=injector.generator)
        return batch._replace(inputs=draw[..., 0], targets=draw[..., 1])
    count = max(1, len(batch.inputs) // 4)
    inputs, targets = batch.inputs.clone(), batch.targets.clone()
    inputs[:count] = fault.strength * torch.randn(inputs[:count].shape, generator=injector.generator)
    if targets.is_floating_point():
        targets[:count] *= fault.strength
    return batch._replace(inputs=inputs, targets=targets)


def noisy_labels(injector: Injector, fault: Fault, since: int, batch: Batch) -> Batch:
    """From now on a share `strength` of the targets belongs to other samples or positions."""
    rows = batch.targets.flatten(0, 1) if batch.targets.dim() > 2 else batch.targets.flatten()
    is_noisy = torch.rand(len(rows), generator=injector.generator) < fault.strength
    shuffled = rows[torch.randperm(len(rows), generator=injector.generator)]
    is_noisy = is_noisy.view(-1, *[1] * (rows.dim() - 1))
    return batch._replace(targets=torch.where(is_noisy, shuffled, rows).view(batch.targets.shape))


def corrupt_optimizer(injector: Injector, fault: Fault, since: int) -> None:
    """A layer's optimizer state is spoilt, once.

    "nan": one entry of Adam's second moment or SGD's momentum; "scaled": the second moment × `strength`, or
    the momentum ÷ √`strength`, either of which makes the next updates too large.
    """
    if since:
        return
    for parameter in injector.layer.parameters(recurse=False):
        state = injector.optimizer.state[parameter]
        is_adam = "exp_avg_sq" in state
        buffer = state["exp_avg_sq" if is_adam else "momentum_buffer"]
        if fault.variant == "nan":
            buffer.view(-1)[0] = math.nan
        else:
            buffer.mul_(fault.strength if is_adam else fault.strength**-0.5)


def overflow(injector: Injector, fault: Fault, since: int) -> None:
    """From now on values of a layer leave the range of its number format and become infinite.

    The variant says which values and format: "forward" (the layer's output) or "backward" (the gradient
    there, as under a loss scale too large), "half" or "bfloat16". They are scaled such that those above
    1/`strength` of the largest overflow.
    """
    if since:
        return
    module = injector.layer
    run = module.forward
    direction, dtype = fault.variant.split()

    def forward(*args: Tensor, **kwargs: object) -> object:
        output = run(*args, **kwargs)
        tensor = output[0] if isinstance(output, tuple) else output
        tensor = _LowPrecision.apply(tensor, direction, getattr(torch, dtype), fault.strength)
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    module.forward = forward  # a hook would come after the probe's


class _LowPrecision(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, direction: str, dtype: torch.dtype, strength: float) -> Tensor:
        ctx.direction, ctx.dtype, ctx.strength = direction, dtype, strength
        return cast_with_overflow(x, dtype, strength) if direction == "forward" else x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.direction == "backward":
            gradient = cast_with_overflow(gradient, ctx.dtype, ctx.strength)
        return gradient, None, None, None


def cast_with_overflow(x: Tensor, dtype: torch.dtype, strength: float) -> Tensor:
    """To another format and back, scaled so that entries above 1/`strength` of the largest overflow."""
    scale = strength * torch.finfo(dtype).max / x.abs().max().double()
    return ((x.double() * scale).to(dtype).double() / scale).to(x.dtype)


def bad_initialisation(injector: Injector, fault: Fault, since: int) -> None:
    """A layer's weights start `strength` times as large as they should."""
    if since == 0:
        weight_of(injector.layer).mul_(fault.strength)


def kill_relu(injector: Injector, fault: Fault, since: int) -> None:
    """The bias before a ReLU goes down: by `strength` once ("sudden") or at every step ("gradual")."""
    if fault.variant == "gradual" or since == 0:
        injector.layer.get_parameter("bias").sub_(fault.strength)


KINDS: dict[str, Kind] = {
    "nan-weight": Kind("model", "weight", False, nonfinite_weight),
    "nan-gradient": Kind("gradient", "weight", False, nonfinite_gradient),
    "nan-batch": Kind("batch", None, False, nonfinite_batch),
    "scaled-weights": Kind("model", "weight", False, scale_weights),
    "qk-growth": Kind("model", "attention", True, grow_query_and_key),
    "entropy-collapse": Kind("model", "attention", True, sharpen_attention),
    "saturation": Kind("model", "attention", True, saturate),
    "learning-rate": Kind("model", None, False, raise_learning_rate),
    "bad-batch": Kind("batch", None, False, bad_batch),
    "label-noise": Kind("batch", None, False, noisy_labels),
    "optimizer-state": Kind("model", "weight", False, corrupt_optimizer),
    "overflow": Kind("model", "weight", False, overflow),
    "initialisation": Kind("model", "weight", False, bad_initialisation),
    "dying-relu": Kind("model", "relu", False, kill_relu),
}
