"""The oracle for row statistics: every row's dense Jacobian in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stability.attention.statistics import AttentionStatistics

BATCH, HEADS, TOKENS_Q, TOKENS_K, HEAD_DIM = 2, 4, 7, 9, 8
FIELDS = (
    "max_logit",
    "log_sum_exp",
    "entropy",
    "jacobian_frobenius",
    "jacobian_spectral",
    "off_diagonal_share",
    "trace",
    "derivative_max",
    "row_sum",
    "saturated_share",
)


def make(dtype: torch.dtype = torch.float32, sharpness: float = 1.0, key_heads: int = HEADS) -> dict:
    return {
        "query": sharpness * torch.randn(BATCH, HEADS, TOKENS_Q, HEAD_DIM, dtype=dtype),
        "key": torch.randn(BATCH, key_heads, TOKENS_K, HEAD_DIM, dtype=dtype),
    }


def dense(arguments: dict, mechanism: str) -> dict[str, Tensor]:
    """Every statistic of every row from the dense Jacobian, in float64, row by row."""
    query, key = arguments["query"].double(), arguments["key"].double()
    key = key.repeat_interleave(HEADS // key.shape[1], dim=1)
    scale = arguments.get("scale") or 1 / math.sqrt(HEAD_DIM)
    logits = scale * query @ key.mT
    allowed = torch.ones(BATCH, HEADS, TOKENS_Q, TOKENS_K, dtype=torch.bool)
    if (mask := arguments.get("attn_mask")) is not None:
        if mask.dtype is torch.bool:
            allowed &= mask
        else:
            logits = logits + mask
            allowed &= mask > -math.inf
    if arguments.get("is_causal"):
        allowed &= torch.ones(TOKENS_Q, TOKENS_K).tril().bool()
    key_lengths = torch.tensor(arguments.get("key_lengths", [TOKENS_K] * BATCH))
    query_lengths = torch.tensor(arguments.get("query_lengths", [TOKENS_Q] * BATCH))
    allowed &= (torch.arange(TOKENS_K) < key_lengths[:, None])[:, None, None]
    allowed &= (torch.arange(TOKENS_Q) < query_lengths[:, None])[:, None, :, None]
    if (score_bias := arguments.get("score_bias")) is not None:
        logits = logits + score_bias[:, None, None]
    bias = arguments.get("bias", -key_lengths.clamp(min=1).double().log()[:, None])
    bias = bias.expand(BATCH, HEADS) if isinstance(bias, Tensor) else torch.full((BATCH, HEADS), bias)

    result = {name: torch.zeros(BATCH, HEADS, TOKENS_Q, dtype=torch.float64) for name in FIELDS}
    for name in ("max_logit", "log_sum_exp"):
        result[name].fill_(-math.inf)
    result["valid"] = allowed.any(dim=-1)
    for b, h, i in result["valid"].nonzero().tolist():
        z = logits[b, h, i][allowed[b, h, i]]
        row = softmax_row(z) if mechanism == "softmax" else sigmoid_row(z, bias[b, h])
        for name, value in row.items():
            result[name][b, h, i] = value
    return result


def jacobian_statistics(jacobian: Tensor) -> dict[str, Tensor]:
    diagonal = jacobian.diagonal()
    off_diagonal = jacobian - diagonal.diag()
    energy = jacobian.square().sum()
    return {
        "jacobian_frobenius": energy.sqrt(),
        "jacobian_spectral": torch.linalg.eigvalsh(jacobian)[-1],
        "off_diagonal_share": off_diagonal.square().sum() / energy if energy > 0 else torch.zeros(()),
        "trace": diagonal.sum(),
        "derivative_max": diagonal.max(),
    }


def softmax_row(z: Tensor) -> dict[str, Tensor]:
    p = z.softmax(dim=0)
    others = p.expand(len(p), -1) * (1 - torch.eye(len(p), dtype=p.dtype))  # 1 − pᵢ without cancellation
    jacobian = (p * others.sum(dim=1)).diag() - p[:, None] * others
    return {
        "max_logit": z.max(),
        "log_sum_exp": z.logsumexp(dim=0),
        "entropy": row_entropy(p),
        **jacobian_statistics(jacobian),
    }


def sigmoid_row(z: Tensor, bias: Tensor) -> dict[str, Tensor]:
    s = torch.sigmoid(z + bias)
    return {
        "max_logit": z.max(),
        "entropy": row_entropy((s + 1e-320) / (s + 1e-320).sum()),
        "row_sum": s.sum(),
        "saturated_share": (s > 0.99).double().mean(),
        **jacobian_statistics((s * torch.sigmoid(-z - bias)).diag()),
    }


def row_entropy(p: Tensor) -> Tensor:
    largest = p.argmax()
    rest = torch.cat([p[:largest], p[largest + 1 :]])
    return -torch.log1p(-rest.sum()) * p[largest] - torch.xlogy(rest, rest).sum()


def assert_matches(statistics: AttentionStatistics, arguments: dict, rtol: float) -> None:
    expected = dense(arguments, statistics.mechanism)
    rows = statistics.rows[:, None].expand(BATCH, HEADS, -1)
    selected = (statistics.row_weights > 0)[:, None]
    assert torch.equal(statistics.valid, expected["valid"].gather(2, rows) & selected)
    for name in FIELDS:
        actual = getattr(statistics, name)
        if actual is None:
            continue
        truth = expected[name].gather(2, rows)
        if name == "jacobian_spectral" and statistics.spectral_kind == "upper_bound":
            assert (actual >= truth * (1 - rtol) - 1e-15)[statistics.valid].all()
            continue
        torch.testing.assert_close(
            actual.double()[statistics.valid],
            truth[statistics.valid],
            rtol=rtol,
            atol=1e-15,
            msg=f"{name} differs",
        )
        empty = -math.inf if name in ("max_logit", "log_sum_exp") else 0.0
        assert (actual[~statistics.valid] == empty).all()
