from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import stability
from stability.attention import flash, report_attention
from stability.attention.call import AttentionCall
from stability.attention.interception import observe_attention, observe_softmax
from stability.attention.rows import RowSelection
from stability.attention.seen import SeenAttention, UnseenAttentionError, seen_logits
from stability.attention.statistics import attention_statistics

TORCH = "torch.nn.functional.scaled_dot_product_attention"
FLEX = "torch.nn.attention.flex_attention.flex_attention"


@pytest.fixture
def seen() -> Iterator[list[tuple[str, SeenAttention]]]:
    """Every attention call made in the test."""
    calls: list[tuple[str, SeenAttention]] = []
    with observe_attention(lambda function, read: calls.append((function, read()))):
        yield calls


def assert_logits(seen: SeenAttention, logits: Tensor) -> None:
    """The call's rows have these logits [batch, heads, tokens_q, tokens_k], sampled or not."""
    expected = seen_logits(logits)
    for rows in (None, 3):
        a, b = (each.statistics(RowSelection(rows, seed=1)) for each in (seen, expected))
        assert a.coverage == b.coverage
        for name in ("max_logit", "log_sum_exp", "entropy", "jacobian_frobenius", "trace", "rows"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6, msg=name)


def masked(logits: Tensor, allowed: Tensor) -> Tensor:
    return logits.masked_fill(~allowed, float("-inf"))


def test_every_way_to_attention_is_seen_with_its_arguments(seen: list[tuple[str, SeenAttention]]) -> None:
    q = torch.rand(2, 4, 5, 8)
    k = torch.rand(2, 2, 7, 8)
    mask = torch.ones(5, 7, dtype=torch.bool)
    nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=0.3, enable_gqa=True)
    nn.functional.scaled_dot_product_attention(q, q, q, None, 0.0, True)
    stability.softmax_attention(q, q, q, key_lengths=[5, 3])
    stability.sigmoid_attention(q, q, q, bias=-1.0)
    report_attention(q, q, mechanism="sigmoid", is_causal=True)
    nn.MultiheadAttention(8, 2, batch_first=True)(q[0], q[0], q[0], need_weights=False)
    assert [function for function, _ in seen] == [
        TORCH,
        TORCH,
        "stability.softmax_attention",
        "stability.sigmoid_attention",
        "stability.attention.report_attention",
        TORCH,
    ]
    calls = [each.call for _, each in seen]
    assert [call.mechanism for call in calls] == ["softmax"] * 3 + ["sigmoid"] * 2 + ["softmax"]
    assert calls[0].attn_mask is mask
    assert (calls[0].scale, calls[0].enable_gqa) == (0.3, True)
    assert calls[1].is_causal
    assert calls[2].key_lengths is not None
    assert calls[3].bias == -1.0
    assert calls[4].is_causal
    assert calls[5].query.shape == (4, 2, 5, 4)


def test_other_ranks_are_brought_to_four_dimensions(seen: list[tuple[str, SeenAttention]]) -> None:
    for shape in ((5, 8), (3, 5, 8), (2, 3, 4, 5, 8)):
        x = torch.rand(shape)
        nn.functional.scaled_dot_product_attention(x, x, x)
    one = torch.rand(1, 4, 5, 8)
    nn.functional.scaled_dot_product_attention(one, one.expand(3, -1, -1, -1), one)
    shapes = [tuple(each.call.query.shape) for _, each in seen]
    assert shapes == [(1, 1, 5, 8), (3, 1, 5, 8), (6, 4, 5, 8), (3, 4, 5, 8)]


def test_autocast_casts_what_torch_casts(seen: list[tuple[str, SeenAttention]]) -> None:
    q = torch.rand(1, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.rand(3, 3))
    call = seen[0][1].call
    assert call.query.dtype == call.key.dtype == torch.bfloat16
    assert call.attn_mask is not None
    assert call.attn_mask.dtype is torch.bfloat16


def test_nested_tensors_are_unseen() -> None:
    x = torch.nested.nested_tensor([torch.rand(2, 3, 4), torch.rand(2, 5, 4)], layout=torch.jagged)
    x = x.transpose(1, 2)
    reads: list[Callable[[], SeenAttention]] = []
    with observe_attention(lambda function, read: reads.append(read)):
        nn.functional.scaled_dot_product_attention(x, x, x)
    with pytest.raises(UnseenAttentionError, match="nested"):
        reads[0]()


class TestStandIns:
    def test_results_are_untouched_and_the_originals_return(self) -> None:
        original, softmax = nn.functional.scaled_dot_product_attention, torch.softmax
        q = torch.rand(1, 2, 3, 4)
        expected = original(q, q, q)
        with observe_attention(lambda *_: None), observe_attention(lambda *_: None):
            assert torch.equal(nn.functional.scaled_dot_product_attention(q, q, q), expected)
        with pytest.raises(KeyError), observe_attention(lambda *_: None):
            raise KeyError
        assert nn.functional.scaled_dot_product_attention is original
        assert torch.softmax is softmax
        assert "softmax" not in vars(Tensor)

    def test_a_patch_made_meanwhile_by_others_stays_and_reports_nothing_twice(self) -> None:
        original = nn.functional.scaled_dot_product_attention
        q = torch.rand(1, 2, 3, 4)
        calls: list[str] = []
        try:
            with observe_attention(lambda function, _: calls.append(function)):
                ours = nn.functional.scaled_dot_product_attention

                def theirs(*args: Tensor) -> Tensor:
                    return ours(*args)

                nn.functional.scaled_dot_product_attention = theirs
            assert nn.functional.scaled_dot_product_attention is theirs
            nn.functional.scaled_dot_product_attention(q, q, q)
            assert calls == []
            with observe_attention(lambda function, _: calls.append(function)):
                nn.functional.scaled_dot_product_attention(q, q, q)
            assert len(calls) == 1
        finally:
            nn.functional.scaled_dot_product_attention = original

    def test_modules_that_imported_the_function_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module: Any = ModuleType("their_model")
        module.attend = nn.functional.scaled_dot_product_attention
        module.flex = torch.compile(flex_attention)  # compiled before the observer came
        monkeypatch.setitem(sys.modules, "their_model", module)
        before = dict(vars(module))
        functions: list[str] = []
        x = torch.rand(1, 1, 2, 4)
        with observe_attention(lambda function, _: functions.append(function)):
            module.attend(x, x, x)
            kept = module.attend  # a copy that outlives the observer
            assert module.flex is not before["flex"]
            assert module.flex.__wrapped__ is before["flex"]
        assert vars(module) == before
        kept(x, x, x)
        assert functions == [TORCH]
        with observe_attention(lambda function, _: functions.append(function)):
            kept(x, x, x)
        assert functions == [TORCH, TORCH]

    def test_lazy_modules_are_not_woken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Lazy(ModuleType):
            def __getattribute__(self, name: str) -> Any:
                raise AssertionError(f"asked for {name}")

        monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
        monkeypatch.setitem(sys.modules, "blocked", None)
        monkeypatch.setitem(sys.modules, "no_module", SimpleNamespace(x=1))
        with observe_attention(lambda *_: None):
            pass

    def test_torch_compile_traces_the_original(self) -> None:
        calls: list[str] = []
        x = torch.rand(1, 1, 2, 4)

        def attend(x: Tensor) -> Tensor:
            weights = x.softmax(-1) + nn.functional.softmax(x, dim=-1) + torch.softmax(x, -1)
            return nn.functional.scaled_dot_product_attention(x, x, weights)

        expected = attend(x)
        with observe_attention(lambda function, _: calls.append(function)):
            with observe_softmax(lambda logits: calls.append("softmax")):
                compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
                torch.testing.assert_close(compiled(x), expected)
        assert calls == []

    def test_what_an_observer_calls_is_not_observed(self) -> None:
        calls = []
        x = torch.rand(1, 1, 2, 4)

        def observer(function: str, read: Callable[[], SeenAttention]) -> None:
            calls.append(function)
            nn.functional.scaled_dot_product_attention(x, x, x)
            torch.softmax(x, -1)

        with observe_attention(observer), observe_softmax(lambda logits: calls.append("softmax")):
            nn.functional.scaled_dot_product_attention(x, x, x)
        assert calls == [TORCH]


class TestSoftmax:
    def test_every_spelling_over_the_last_axis(self) -> None:
        x = torch.rand(2, 3, 4)
        shapes = []
        with observe_softmax(lambda logits: shapes.append(tuple(logits.shape))):
            for result in (
                x.softmax(-1),
                x.softmax(dim=2),
                torch.softmax(x, -1),
                nn.functional.softmax(x, dim=-1),
                nn.Softmax(dim=-1)(x),
                torch.softmax(input=x, dim=-1, dtype=torch.float64),
            ):
                torch.testing.assert_close(result, x.exp() / x.exp().sum(-1, True), check_dtype=False)
            x.softmax(1)
            x[0, 0].softmax(-1)
            x.log_softmax(-1)
        assert shapes == [(2, 3, 4)] * 6

    def test_multihead_attention_that_returns_its_weights(self) -> None:
        logits = []
        x = torch.rand(2, 5, 8)
        with observe_attention(lambda *_: pytest.fail("seen twice")), observe_softmax(logits.append):
            _, weights = nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x, average_attn_weights=False)
        torch.testing.assert_close(torch.softmax(logits[0], -1).unflatten(0, (2, 2)), weights)

    def test_this_packages_attention_is_not_seen_twice(self) -> None:
        x = torch.rand(1, 2, 3, 4)
        with observe_softmax(lambda logits: pytest.fail("seen twice")):
            stability.softmax_attention(x, x, x)
            stability.softmax_attention(x, x, x, key_lengths=[2])

    def test_statistics_of_logits_are_those_of_query_and_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("stability.attention.seen._CHUNK_ELEMENTS", 40)  # chunks of one row
        q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
        logits = seen_logits((q @ k.mT) * 8**-0.5)
        assert tuple(logits.call.query.shape) == (2, 4, 5, 0)
        for rows in (None, 3):
            a = logits.statistics(RowSelection(rows, seed=4))
            b = attention_statistics(q, k, mechanism="softmax", rows=rows, seed=4)
            assert (a.coverage, a.spectral_kind) == (b.coverage, b.spectral_kind)
            for name, value in vars(b).items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(getattr(a, name), value, rtol=1e-5, atol=1e-6, msg=name)
            assert torch.equal(a.valid, b.valid)
            assert set(a.summarize()) == set(b.summarize())


def test_the_fast_path_of_frozen_modules_is_unseen() -> None:
    x = torch.rand(2, 5, 8)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    expected = encoder(x), layer(x, x, x)[0]
    reads: dict[str, Callable[[], SeenAttention]] = {}
    with observe_attention(reads.__setitem__):
        assert torch.equal(encoder(x), expected[0])
        assert torch.equal(layer(x, x, x)[0], expected[1])
    assert list(reads) == ["torch._transformer_encoder_layer_fwd", "torch._native_multi_head_attention"]
    for read in reads.values():
        with pytest.raises(UnseenAttentionError, match="set_fastpath_enabled"):
            read()
    encoder.requires_grad_(True)  # training in evaluation mode takes no fast path
    calls: list[str] = []
    with observe_attention(lambda function, _: calls.append(function)):
        encoder(x)
    assert calls == [TORCH]


class TestFlexAttention:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8)

    @property
    def products(self) -> Tensor:
        return self.q @ self.k.repeat_interleave(2, dim=1).mT

    def test_without_modifications(self, seen: list[tuple[str, SeenAttention]]) -> None:
        flex = sys.modules["torch.nn.attention.flex_attention"].flex_attention
        flex(self.q, self.k, self.k, scale=0.5, enable_gqa=True)
        [(function, each)] = seen
        assert function == FLEX
        assert each.row_logits is None
        assert_logits(each, self.products * 0.5)

    def test_score_and_mask_functions(self, seen: list[tuple[str, SeenAttention]]) -> None:
        bias, documents = torch.randn(4), torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0] * 9])

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return 2 * torch.tanh(s / 2) + bias[h] * (i - j)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (documents[b, i] == documents[b, j]) & (i >= j - 1)

        block_mask = create_block_mask(mask, 2, None, 6, 9, device="cpu")
        # Through this module's own name, which the observer replaced as well.
        flex_attention(self.q, self.k, self.k, score, block_mask, enable_gqa=True)
        i, j = torch.arange(6)[:, None], torch.arange(9)
        logits = 2 * torch.tanh(self.products * 8**-0.5 / 2) + bias[:, None, None] * (i - j)
        allowed = (documents[:, :6, None] == documents[:, None]) & (i >= j - 1)
        assert_logits(seen[0][1], masked(logits, allowed[:, None]))


class TestFlashAttention:
    """Against dense logits with FlashAttention's documented alignment at the last query and key."""

    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8)
    logits = q @ k.repeat_interleave(2, dim=1).mT * 0.3
    distance = torch.arange(9) - torch.arange(6)[:, None] - 3

    def read(self, **kwargs: Any) -> SeenAttention:
        q, k = self.q.transpose(1, 2), self.k.transpose(1, 2)
        return flash.read_flash_attn(q, k, k, softmax_scale=0.3, **kwargs)

    def test_plain(self) -> None:
        assert_logits(self.read(), self.logits)
        same = flash.read_flash_attn(*[self.q.transpose(1, 2)] * 3, causal=True)
        assert same.row_logits is None
        assert same.call.is_causal

    def test_causal_with_more_keys_than_queries(self) -> None:
        assert_logits(self.read(causal=True), masked(self.logits, self.distance <= 0))

    def test_window_softcap_and_alibi(self) -> None:
        slopes = torch.rand(4)
        logits = 1.5 * torch.tanh(self.logits / 1.5) - slopes[:, None, None] * self.distance.abs()
        allowed = (self.distance >= -2) & (self.distance <= 1)
        assert_logits(
            self.read(window_size=(2, 1), softcap=1.5, alibi_slopes=slopes), masked(logits, allowed)
        )

    def test_packed_arguments(self) -> None:
        qkv = torch.stack([self.q.transpose(1, 2)] * 3, dim=2)
        assert_logits(flash.read_flash_attn_qkvpacked(qkv, 0.0, 0.3), self.q @ self.q.mT * 0.3)
        kv = torch.stack([self.k.transpose(1, 2)] * 2, dim=2)
        assert_logits(flash.read_flash_attn_kvpacked(self.q.transpose(1, 2), kv, 0.0, 0.3), self.logits)

    def test_the_package_is_seen_where_it_is_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        package: Any = ModuleType("flash_attn")
        package.flash_attn_func = lambda q, k, v, **_: v
        package.flash_attn_varlen_func = lambda q, k, v, **_: v
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        reads: dict[str, Callable[[], SeenAttention]] = {}
        x = torch.rand(1, 5, 2, 8)
        with observe_attention(reads.__setitem__):
            package.flash_attn_func(x, x, x, causal=True)
            package.flash_attn_varlen_func(x[0], x[0], x[0])
        assert reads["flash_attn.flash_attn_func"]().call.query.shape == (1, 2, 5, 8)
        with pytest.raises(UnseenAttentionError, match="packed"):
            reads["flash_attn.flash_attn_varlen_func"]()

    def test_transformers_padding_and_packing(self) -> None:
        q = self.q
        logits = q @ q.mT * 0.3
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
        read = flash.read_transformers_flash_attention
        causal = torch.ones(6, 6, dtype=torch.bool).tril()
        module = SimpleNamespace(is_causal=True)
        allowed = causal & (mask[:, None, :, None] & mask[:, None, None, :]).bool()
        assert_logits(read(module, q, q, q, mask, scaling=0.3), masked(logits, allowed))
        window = allowed & (causal.int().cumsum(0) <= 3)
        assert_logits(read(module, q, q, q, mask, scaling=0.3, sliding_window=3), masked(logits, window))
        positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
        same = torch.arange(6)[:, None] // 3 == torch.arange(6) // 3
        packed = read(module, q[:1], q[:1], q[:1], None, scaling=0.3, position_ids=positions)
        assert_logits(packed, masked(logits[:1], causal & same))
        with pytest.raises(UnseenAttentionError, match="packed"):
            read(module, q, q, q, None, cu_seq_lens_q=torch.tensor([0, 3, 6]))
        with pytest.raises(UnseenAttentionError, match="sinks"):
            read(module, q, q, q, None, s_aux=torch.zeros(4))


def test_reporting_without_observers_does_nothing() -> None:
    report_attention("no", "tensors")  # type: ignore[arg-type]


def test_a_mask_per_head_stays_one() -> None:
    query, mask = torch.rand(2, 4, 5, 8), torch.randn(4, 5, 5)
    calls: list[AttentionCall] = []
    with observe_attention(lambda function, read: calls.append(read().call)):
        nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        nn.functional.scaled_dot_product_attention(query[None], query[None], query[None], attn_mask=mask)
        nn.functional.scaled_dot_product_attention(query[0], query[0], query[0], attn_mask=mask)
    assert [torch.broadcast_to(call.attn_mask, (*call.query.shape[:2], 5, 5)).shape for call in calls] == [
        (2, 4, 5, 5), (2, 4, 5, 5), (4, 1, 5, 5)
    ]  # fmt: skip
    torch.testing.assert_close(torch.broadcast_to(calls[1].attn_mask, (2, 4, 5, 5)), mask.expand(2, 4, 5, 5))
    torch.testing.assert_close(calls[2].attn_mask[:, 0], mask)


def test_torch_compile_that_is_imported_while_observing_knows_the_originals() -> None:
    script = """
import torch
from stability.attention.interception import observe_softmax

def attend(x):
    return torch.softmax(x, -1)

with observe_softmax(lambda logits: None):
    torch.compile(attend, backend="aot_eager", fullgraph=True)(torch.rand(2, 3))
torch.compile(lambda x: attend(x) * 2, backend="aot_eager", fullgraph=True)(torch.rand(2, 3))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
