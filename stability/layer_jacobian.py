"""Norms of a whole layer's Jacobian ∂output/∂input, matrix-free: Jacobian-vector products only.

Not to be confused with the row Jacobian ∂weights/∂logits of `stability.jacobian`, whose bounds say nothing
about a layer: dot-product attention is not globally Lipschitz for either mechanism (docs/science.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability.html_table import html_table
from stability.norms import tensor_norm


class LayerJacobianNorms(NamedTuple):
    """Norms of ∂output/∂input as 0-d tensors on the input's device.

    Attributes:
        spectral: ‖J‖₂ from below (a Rayleigh quotient).
        spectral_residual: ‖JᵀJv − σ²v‖/σ² at the vector v it was taken at: some singular value lies within
            this relative distance of σ in its square. 0 where J is zero.
        frobenius: Estimate of ‖J‖_F.
        frobenius_standard_error: Standard error of that estimate.

    Example:
        >>> norms = layer_jacobian_norms(lambda x: 3 * x, torch.ones(1, 4, dtype=torch.float64))
        >>> f"{norms.spectral:.3f} {norms.frobenius:.3f}"  # 3 and 3 √4
        '3.000 6.000'
    """

    spectral: Tensor
    spectral_residual: Tensor
    frobenius: Tensor
    frobenius_standard_error: Tensor

    def _repr_html_(self) -> str:
        return html_table(
            ("norm of ∂output/∂input", "value", "how exact"),
            [
                ["spectral", f"{self.spectral:.4g}", f"from below; residual {self.spectral_residual:.1e}"],
                ["frobenius", f"{self.frobenius:.4g}", f"± {self.frobenius_standard_error:.2g}"],
            ],
        )


@torch.no_grad()
def layer_jacobian_norms(
    function: Callable[[Tensor], Tensor],
    input: Tensor,
    *,
    num_iterations: int = 20,
    num_probes: int = 16,
    seed: int = 0,
) -> LayerJacobianNorms:
    """Spectral and Frobenius norm of J = ∂function(input)/∂input.

    Spectral norm: power iteration on JᵀJ, one JVP and one VJP each; σ = ‖Jv‖ over unit vectors v never
    exceeds ‖J‖₂ and grows towards it. Frobenius norm: Hutchinson's estimator ‖J‖_F² = E‖Jᵀu‖² over
    Rademacher vectors u, one VJP each; its standard error by the delta method, SE(‖J‖_F²)/(2‖J‖_F).

    The function runs `num_iterations` + 1 times, each time from the same random state, so dropout stays one
    mask; the global random state is left as it was. No graph and no `.grad` remain, and the device is never
    waited for. Modules with running statistics (BatchNorm) must be in evaluation mode.

    Scaled dot-product attention inside the function runs on its MATH backend: the fused kernels, and the
    fused inference path of `nn.TransformerEncoder`, have no forward-mode derivative.

    Args:
        function: Maps a tensor to a tensor, any shapes; a module is one.
        input: Point at which to differentiate; floating point, not empty. Its graph is ignored.
        num_iterations: Power iterations, at least 1.
        num_probes: Rademacher probes, at least 2.
        seed: Of the estimator's own generator.

    Returns:
        Norms; all zero where the Jacobian is, and NaN, or infinite, where it is not finite.

    Raises:
        TypeError: `function` is no callable, or input or output is no floating-point tensor.
        ValueError: The input or output is empty, or a count is too small.
        NotImplementedError: An operation in `function` has no forward-mode derivative.

    Source: Hutchinson 1989 (trace estimator); Golub & Van Loan, "Matrix Computations", §7.3 (power
    iteration); errors derived in docs/science.md.

    Example:
        >>> norms = layer_jacobian_norms(lambda x: torch.tensor([3.0, 4.0]) * x, torch.zeros(2))
        >>> f"{norms.spectral:.3f} {norms.frobenius:.3f}"
        '4.000 5.000'
    """
    _check(function, input, num_iterations, num_probes)
    input = input.detach()
    generator = torch.Generator(device=input.device).manual_seed(seed)
    with _differentiable_attention():
        frozen = _with_frozen_randomness(function, input.device)
        output, vjp = torch.func.vjp(frozen, input)  # type: ignore[misc]  # 3 only with has_aux
        v = torch.randn(input.shape, generator=generator, dtype=input.dtype, device=input.device)
        v, _ = _normalized(v)
        for _ in range(num_iterations):
            length = _norm(v)  # 1 up to rounding, which is 1e-3 in half precision
            u, image = _normalized(_jvp(frozen, input, v))
            (w,) = vjp(u)  # normalising in between keeps tiny Jacobians from underflowing
            spectral = _ratio(image, length)
            residual = _ratio(_norm(w - _ratio(spectral, length) * v), spectral)
            v, _ = _normalized(w)
        lengths = []
        for _ in range(num_probes):
            signs = torch.randint(2, output.shape, generator=generator, device=output.device)
            lengths.append(_norm(vjp((2 * signs - 1).to(output.dtype))[0]))
    length = torch.stack(lengths)
    longest = length.amax()
    unit = torch.where((longest > 0) & longest.isfinite(), longest, 1.0)  # squares of 1e200 leave the range
    energy = (length / unit).square()
    frobenius = energy.mean().sqrt()
    energy_error = energy.std() / num_probes**0.5
    return LayerJacobianNorms(
        spectral=spectral,
        spectral_residual=residual,
        frobenius=unit * frobenius,
        frobenius_standard_error=unit * _ratio(energy_error, 2 * frobenius),
    )


def _check(function: object, input: object, num_iterations: int, num_probes: int) -> None:
    if not callable(function):
        raise TypeError(f"`function` must be callable (a module is); got {type(function).__name__}.")
    _check_tensor(input, "input")
    if num_iterations < 1 or num_probes < 2:
        raise ValueError(
            "`num_iterations` must be at least 1, and `num_probes` at least 2 for a standard error; "
            f"got {num_iterations} and {num_probes}."
        )


def _check_tensor(tensor: object, role: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"The {role} of `function` must be a tensor; got {type(tensor).__name__}. "
            "Wrap the layer, e.g. lambda x: layer(x)[0]."
        )
    if not tensor.is_floating_point():
        raise TypeError(
            f"The {role} of `function` must be floating point to be differentiated; got {tensor.dtype}. "
            "For token ids, differentiate from the embedding onwards."
        )
    if tensor.numel() == 0:
        raise ValueError(f"The {role} of `function` must not be empty; got shape {tuple(tensor.shape)}.")


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Keep PyTorch from fused attention kernels, which lack forward-mode derivatives."""
    is_fastpath_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fastpath_enabled)


def _with_frozen_randomness(
    function: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The function, every call of which starts from today's random state and puts it back."""
    devices = [device] if device.type == "cuda" else []

    def frozen(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=devices):
            output = function(x.clone())  # it may work in place
        _check_tensor(output, "output")
        return output

    return frozen


def _jvp(function: Callable[[Tensor], Tensor], input: Tensor, tangent: Tensor) -> Tensor:
    try:
        return torch.func.jvp(function, (input,), (tangent,))[1]
    except NotImplementedError as error:
        raise NotImplementedError(
            "An operation in `function` has no forward-mode derivative, which the power iteration needs. "
            f"Use a plain PyTorch implementation of it here. PyTorch said: {error}"
        ) from error


def _norm(tensor: Tensor) -> Tensor:
    return tensor_norm(tensor)


def _normalized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vector (zero stays zero) and the norm."""
    norm = _norm(tensor)
    return tensor / torch.where(norm == 0, torch.ones_like(norm), norm), norm


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient of two non-negative numbers, 0 where the denominator vanishes; NaN where either is."""
    is_zero = (denominator == 0) & ~numerator.isnan()
    return torch.where(is_zero, torch.zeros_like(numerator), numerator / denominator)
