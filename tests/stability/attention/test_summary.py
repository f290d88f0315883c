"""What a probe records of an attention call: values, labels and standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stability.attention.statistics import attention_statistics
from stability.attention.summary import summarize_calls

MEANS = ("entropy", "jacobian_frobenius", "jacobian_spectral", "off_diagonal_share")


def inputs(tokens: int = 64, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, tokens, 8), torch.randn(batch, 3, tokens, 8)


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_all_rows_give_exact_means_and_maxima(mechanism: str) -> None:
    statistics = attention_statistics(*inputs(), mechanism=mechanism, exact_spectral=True)
    summary = statistics.summarize()
    sigmoid_only = ("row_sum", "saturated_share") if mechanism == "sigmoid" else ()
    assert tuple(summary) == ("max_logit", "derivative_max", *MEANS, *sigmoid_only)
    for name, reduced in summary.items():
        rows = getattr(statistics, name)
        expected = rows.amax(dim=(0, 2)) if name in ("max_logit", "derivative_max") else rows.mean(dim=(0, 2))
        torch.testing.assert_close(reduced.per_head, expected)
        whole = rows.max() if name in ("max_logit", "derivative_max") else rows.mean()
        torch.testing.assert_close(reduced.value, whole)
        assert reduced.value.ndim == 0
        assert (reduced.kind, reduced.standard_error, reduced.per_head_standard_error) == (
            "exact",
            None,
            None,
        )


def test_labels_of_bounds_samples_and_given_rows() -> None:
    def kinds(**options: object) -> dict[str, str]:
        statistics = attention_statistics(*inputs(), mechanism="softmax", **options)
        return {name: reduced.kind for name, reduced in statistics.summarize().items()}

    assert kinds()["jacobian_spectral"] == "upper_bound"
    assert kinds()["entropy"] == kinds()["max_logit"] == "exact"
    for rows in (8, torch.tensor([3, 5])):
        assert kinds(rows=rows)["max_logit"] == kinds(rows=rows)["derivative_max"] == "lower_bound"
        assert kinds(rows=rows)["entropy"] == "estimate"
        assert kinds(rows=rows)["jacobian_spectral"] == "upper_bound"
        assert kinds(rows=rows, exact_spectral=True)["jacobian_spectral"] == "estimate"
    assert kinds(rows=64)["entropy"] == "exact"


def test_padding_counts_for_nothing() -> None:
    query, key = inputs()
    lengths = [64, 10]
    summary = attention_statistics(
        query, key, mechanism="sigmoid", key_lengths=lengths, query_lengths=lengths
    ).summarize()
    long = attention_statistics(query[:1], key[:1], mechanism="sigmoid")
    short = attention_statistics(query[1:, :, :10], key[1:, :, :10], mechanism="sigmoid")
    for name, reduced in summary.items():
        rows = torch.cat([getattr(long, name), getattr(short, name)], dim=2)
        expected = rows.max() if name in ("max_logit", "derivative_max") else rows.mean()
        torch.testing.assert_close(reduced.value, expected, rtol=1e-5, atol=1e-7)


def test_sampled_means_are_unbiased_and_their_errors_honest() -> None:
    """Over 300 samples of 6 rows from sequences of 61 and 17: uneven strata, a trend along the sequence."""
    query, key = inputs(tokens=61)
    arguments = {"mechanism": "softmax", "is_causal": True, "query_lengths": [61, 17]}
    truth = attention_statistics(query, key, **arguments).summarize()["entropy"]
    samples = [
        attention_statistics(query, key, **arguments, rows=6, seed=seed).summarize()["entropy"]
        for seed in range(300)
    ]
    for exact, values, errors in (
        (truth.value, [s.value for s in samples], [s.standard_error for s in samples]),
        (
            truth.per_head[1],
            [s.per_head[1] for s in samples],
            [s.per_head_standard_error[1] for s in samples],
        ),
    ):
        values, spread = torch.stack(values), torch.stack(values).std()
        assert (values.mean() - exact).abs() < 4 * spread / math.sqrt(300)
        stated = torch.stack(errors).square().mean().sqrt()
        assert 0.9 * spread < stated < 2 * spread


def test_sample_that_takes_every_row_has_no_error() -> None:
    query, key = inputs(tokens=32)
    lengths = [5, 3]
    arguments = {"mechanism": "softmax", "query_lengths": lengths}
    sampled = attention_statistics(query, key, **arguments, rows=8).summarize()["entropy"]
    exact = attention_statistics(query, key, **arguments).summarize()["entropy"]
    torch.testing.assert_close(sampled.value, exact.value)
    assert sampled.kind == "estimate"
    assert sampled.standard_error == 0


def test_unknown_errors_are_nan() -> None:
    query, key = inputs(tokens=32)
    for rows in (1, torch.tensor([4, 9])):
        reduced = attention_statistics(query, key, mechanism="softmax", rows=rows).summarize()["entropy"]
        assert reduced.standard_error.isnan()
        assert reduced.per_head_standard_error.isnan().all()
        assert reduced.standard_error.ndim == 0
        assert reduced.per_head_standard_error.shape == (3,)


def test_nothing_valid_gives_nan_means_and_infinite_maxima() -> None:
    query, key = inputs(tokens=4)
    summary = attention_statistics(query, key, mechanism="softmax", query_lengths=[0, 0]).summarize()
    assert summary["entropy"].value.isnan()
    assert summary["max_logit"].value == -math.inf


def test_calls_summarised_together_are_those_summarised_alone() -> None:
    """Two shapes, both mechanisms, all rows, samples and given ones, padded or not, in any order."""
    calls = [
        attention_statistics(
            *inputs(tokens), mechanism=mechanism, rows=rows, key_lengths=lengths, query_lengths=lengths
        )
        for rows in (None, 8, torch.tensor([3, 5]))
        for lengths in (None, [12, 5], [0, 0])
        for tokens in (16, 24)
        for mechanism in ("softmax", "sigmoid")
    ]
    for call, summary in zip(calls, summarize_calls(calls), strict=True):
        together, alone = summary.by_name(), call.summarize()
        assert together.keys() == alone.keys()
        for name, expected in alone.items():
            for field, value in vars(expected).items():
                found = getattr(together[name], field)
                if isinstance(value, Tensor):
                    torch.testing.assert_close(found, value, equal_nan=True)
                else:
                    assert found == value


def test_nothing_to_summarise() -> None:
    assert summarize_calls([]) == []
