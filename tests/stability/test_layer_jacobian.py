from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stability.layer_jacobian import LayerJacobianNorms, layer_jacobian_norms


class SelfAttention(nn.Module):
    """Calls the fused kernel, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.projection(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Layers in evaluation mode, and the shapes of their inputs."""
    mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5))
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    norm = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(inplace=True))
    return {
        "mlp": (mlp, (3, 8)),
        "attention": (SelfAttention(), (2, 6, 8)),
        "encoder layer": (encoder.eval(), (2, 5, 8)),
        "in-place first": (nn.Sequential(nn.ReLU(inplace=True), norm), (4, 8)),
    }


def dense_jacobian(function, input: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.func.jacrev(lambda x: function(x.clone()))(input).detach()
    return jacobian.reshape(-1, input.numel())


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("name", layers())
def test_norms_agree_with_the_dense_jacobian(name: str, is_frozen: bool) -> None:
    layer, shape = layers()[name]
    layer.double().requires_grad_(not is_frozen)
    input = torch.randn(shape, dtype=torch.float64)
    dense = dense_jacobian(layer, input)
    norms = layer_jacobian_norms(layer, input, num_iterations=150, num_probes=200)
    assert norms.spectral.item() == pytest.approx(torch.linalg.matrix_norm(dense, 2).item(), rel=1e-6)
    assert norms.spectral_residual < 1e-2
    error = abs(norms.frobenius - torch.linalg.matrix_norm(dense))
    assert error < 4 * norms.frobenius_standard_error
    assert norms.frobenius_standard_error < 0.05 * norms.frobenius


def test_spectral_norm_is_a_lower_bound_that_grows_and_its_residual_shrinks() -> None:
    matrix = torch.randn(30, 40, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix, 2)
    found = [
        layer_jacobian_norms(lambda x: matrix @ x, torch.zeros(40).double(), num_iterations=n, num_probes=2)
        for n in (1, 3, 10, 100, 1000)
    ]
    spectral = torch.stack([norms.spectral for norms in found])
    assert (spectral <= exact * (1 + 1e-12)).all()
    assert (spectral.diff() > -1e-12).all()
    assert spectral[0] < 0.9 * exact
    assert found[0].spectral_residual > 0.1
    assert found[-1].spectral_residual < 1e-10
    assert spectral[-1].item() == pytest.approx(exact.item(), rel=1e-12)


def test_some_singular_value_lies_within_the_residual() -> None:
    matrix = torch.randn(30, 40, dtype=torch.float64)
    squares = torch.linalg.svdvals(matrix).square()
    for num_iterations in (1, 2, 5, 20):
        norms = layer_jacobian_norms(
            lambda x: matrix @ x, torch.zeros(40).double(), num_iterations=num_iterations
        )
        distance = (squares - norms.spectral.square()).abs().min()
        assert distance <= norms.spectral_residual * norms.spectral.square() * (1 + 1e-9)


def test_standard_error_is_that_of_many_repetitions() -> None:
    matrix = torch.randn(12, 9, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix)
    found = [
        layer_jacobian_norms(
            lambda x: matrix @ x, torch.zeros(9).double(), num_iterations=1, num_probes=20, seed=seed
        )
        for seed in range(200)
    ]
    estimates = torch.stack([norms.frobenius for norms in found])
    claimed = torch.stack([norms.frobenius_standard_error for norms in found]).mean()
    assert 0.8 < claimed / estimates.std() < 1.25
    assert abs(estimates.mean() - exact) < 0.2 * claimed


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_tiny_and_huge_jacobians_keep_their_norms(scale: float) -> None:
    norms = layer_jacobian_norms(lambda x: x * scale, torch.ones(16))
    assert norms.spectral.item() == pytest.approx(scale, rel=1e-5)
    assert norms.frobenius.item() == pytest.approx(4 * scale, rel=1e-5)


@pytest.mark.parametrize("function", [lambda x: x * 0, lambda x: torch.ones(3), torch.sign])
def test_a_zero_jacobian_gives_zeros(function) -> None:
    assert layer_jacobian_norms(function, torch.ones(4)) == LayerJacobianNorms(*torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    norms = layer_jacobian_norms(lambda x: 3 * x, torch.ones(64, dtype=dtype))
    assert norms.spectral.item() == pytest.approx(3, rel=1e-3)
    assert norms.frobenius.item() == pytest.approx(24, rel=1e-3)


def test_dropout_is_one_mask_throughout_and_the_random_state_stays() -> None:
    layer = nn.Dropout(0.5).train()
    before = torch.get_rng_state()
    norms = layer_jacobian_norms(layer, torch.ones(1000), num_iterations=50)
    assert torch.equal(torch.get_rng_state(), before)
    num_kept = int((layer(torch.ones(1000)) > 0).sum())  # the mask that the state would have drawn
    assert norms.frobenius.item() == pytest.approx(2 * num_kept**0.5, rel=1e-6)
    assert norms.frobenius_standard_error < 1e-6
    assert norms.spectral.item() == pytest.approx(2, rel=1e-6)


def test_the_seed_decides() -> None:
    layer = nn.Linear(6, 6)
    input = torch.randn(2, 6)
    first, again, other = (layer_jacobian_norms(layer, input, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.frobenius != other.frobenius


def test_nothing_is_left_behind() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    input = torch.randn(2, 5, 8, requires_grad=True)
    copy = input.detach().clone()
    is_fastpath_enabled = torch.backends.mha.get_fastpath_enabled()
    is_flash_enabled = torch.backends.cuda.flash_sdp_enabled()
    norms = layer_jacobian_norms(layer, input)
    assert not any(field.requires_grad for field in norms)
    assert input.grad is None
    assert torch.equal(input, copy)
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == is_fastpath_enabled
    assert torch.backends.cuda.flash_sdp_enabled() == is_flash_enabled


def test_settings_are_restored_after_an_exception() -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyError("from inside")

    is_fastpath_enabled = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError):
        layer_jacobian_norms(fail, torch.ones(3))
    assert torch.backends.mha.get_fastpath_enabled() == is_fastpath_enabled
    assert torch.is_grad_enabled()


@pytest.mark.gpu
def test_the_device_is_never_waited_for() -> None:
    layer = nn.Sequential(nn.Linear(8, 8), SelfAttention()).cuda()
    input = torch.randn(2, 6, 8, device="cuda")
    layer_jacobian_norms(layer, input)  # first calls may synchronise while libraries load
    torch.cuda.set_sync_debug_mode("error")
    try:
        norms = layer_jacobian_norms(layer, input)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norms.spectral.device.type == "cuda"


class TestBadInput:
    def test_no_callable(self) -> None:
        with pytest.raises(TypeError, match="`function` must be callable"):
            layer_jacobian_norms(torch.ones(3), torch.ones(3))  # type: ignore[arg-type]

    @pytest.mark.parametrize("input", [[1.0, 2.0], None])
    def test_input_that_is_no_tensor(self, input) -> None:
        with pytest.raises(TypeError, match="input of `function` must be a tensor"):
            layer_jacobian_norms(torch.sin, input)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
    def test_input_that_is_not_floating_point(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match="input of `function` must be floating point"):
            layer_jacobian_norms(torch.abs, torch.ones(3, dtype=dtype))

    def test_empty_input(self) -> None:
        with pytest.raises(ValueError, match=r"input of `function` must not be empty; got shape \(0, 3\)"):
            layer_jacobian_norms(torch.sin, torch.ones(0, 3))

    def test_output_that_is_no_tensor(self) -> None:
        with pytest.raises(TypeError, match="output of `function` must be a tensor; got tuple"):
            layer_jacobian_norms(lambda x: (x, x), torch.ones(3))

    def test_output_that_is_not_floating_point(self) -> None:
        with pytest.raises(TypeError, match="output of `function` must be floating point"):
            layer_jacobian_norms(lambda x: x.long(), torch.ones(3))

    def test_empty_output(self) -> None:
        with pytest.raises(ValueError, match="output of `function` must not be empty"):
            layer_jacobian_norms(lambda x: x[:0], torch.ones(3))

    @pytest.mark.parametrize("counts", [{"num_iterations": 0}, {"num_probes": 1}])
    def test_counts_too_small(self, counts) -> None:
        with pytest.raises(ValueError, match="must be at least 1, and `num_probes` at least 2"):
            layer_jacobian_norms(torch.sin, torch.ones(3), **counts)

    def test_operation_without_forward_mode_derivative(self) -> None:
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(x):
                return 2 * x

            @staticmethod
            def setup_context(ctx, inputs, output):
                pass

            @staticmethod
            def backward(ctx, grad):
                return 2 * grad

        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            layer_jacobian_norms(Double.apply, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jacobian_that_is_not_finite_gives_no_number_for_zero(dtype: torch.dtype) -> None:
    points = {
        "nan": torch.tensor([-1.0, 1.0], dtype=dtype),
        "infinite": torch.tensor([0.0, 1.0], dtype=dtype),
    }
    for point in points.values():
        norms = layer_jacobian_norms(torch.sqrt, point)
        assert not any(torch.isfinite(norm) for norm in norms)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_jacobians_whose_squares_leave_the_range_of_float64(scale: float) -> None:
    norms = layer_jacobian_norms(lambda x: scale * x, torch.ones(4, dtype=torch.float64))
    assert norms.spectral.item() / scale == pytest.approx(1.0)
    assert norms.frobenius.item() / scale == pytest.approx(2.0)
    assert norms.frobenius_standard_error.item() / scale == pytest.approx(0.0)
