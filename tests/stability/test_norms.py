from __future__ import annotations

import math

import pytest
import torch

from stability.norms import count_nonfinite, largest_entries, max_abs, tensor_norms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_agree_with_a_float64_sum(dtype: torch.dtype, device: str) -> None:
    tensors = [torch.randn(7, 5).to(device, dtype), torch.randn(3, 4).T.to(device, dtype)]
    for tensor, norm in zip(tensors, tensor_norms(tensors), strict=True):
        assert norm.shape == ()
        assert norm.dtype == torch.float64
        assert norm.device == tensor.device
        assert norm.item() == pytest.approx(tensor.double().square().sum().sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 6e4),
        (torch.float16, 6e-8),
        (torch.bfloat16, 1e30),
        (torch.float32, 1e20),
        (torch.float32, 3e38),
        (torch.float32, 1e-25),
        (torch.float32, 1e-44),
    ],
)
def test_no_finite_tensor_overflows_or_underflows(dtype: torch.dtype, value: float, device: str) -> None:
    tensor = torch.full((3, 3), value, dtype=dtype, device=device)
    (norm,) = tensor_norms([tensor])
    assert norm.item() == pytest.approx(3 * tensor[0, 0].item(), rel=1e-6)


def test_float64_is_rescaled_too() -> None:
    for value in (1e200, 1e-200):
        (norm,) = tensor_norms([torch.full((4,), value, dtype=torch.float64)])
        assert norm.item() == pytest.approx(2 * value, rel=1e-12)


def test_a_small_entry_beside_a_large_one_is_harmless() -> None:
    (norm,) = tensor_norms([torch.tensor([1e20, 1e-20])])
    assert norm.item() == pytest.approx(1e20, rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_zero_and_empty_tensors_have_norm_zero(device: str) -> None:
    norms = tensor_norms([torch.zeros(3, device=device), torch.empty(0, device=device)])
    assert [norm.item() for norm in norms] == [0, 0]
    assert tensor_norms([]) == []


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_stay_visible(device: str) -> None:
    nan, inf = tensor_norms(
        [torch.tensor([1.0, math.nan], device=device), torch.tensor([1.0, -math.inf], device=device)]
    )
    assert nan.isnan()
    assert inf.item() == math.inf


def test_no_graph_is_kept() -> None:
    (norm,) = tensor_norms([torch.ones(3, requires_grad=True)])
    assert not norm.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_is_counted(dtype: torch.dtype, device: str) -> None:
    tensors = [
        torch.tensor(entries, dtype=dtype, device=device)
        for entries in ([1.0, math.nan, -math.inf], [0.0, 2.0], [math.inf, math.inf, math.inf])
    ]
    assert count_nonfinite(tensors, largest_entries(tensors)).tolist() == [2, 0, 3]


def test_max_abs_is_of_either_sign_and_keeps_the_dtype() -> None:
    assert max_abs(torch.tensor([1.0, -3.0, 2.0], dtype=torch.float16)) == 3
    assert max_abs(torch.tensor([1.0, -3.0, 2.0], dtype=torch.float16)).dtype == torch.float16
    assert max_abs(torch.empty(0)) == 0
    assert max_abs(torch.tensor([1.0, math.nan])).isnan()
    assert max_abs(torch.tensor([1.0, -math.inf])) == math.inf


def test_long_sums_keep_their_digits():
    entries = torch.full((50_000_000,), 0.1)
    (norm,) = tensor_norms([entries])
    assert abs(norm.item() / (float(entries[0]) * 50_000_000**0.5) - 1) < 1e-5
