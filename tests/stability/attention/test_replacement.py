from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import stability
from stability.attention import report_attention
from stability.attention.replaced_calls import ReplacedSite

SDPA = "torch.nn.functional.scaled_dot_product_attention"


def sigmoid_by_hand(logits: Tensor, value: Tensor, num_keys: int | Tensor) -> Tensor:
    return torch.sigmoid(logits - torch.as_tensor(num_keys).log()) @ value


class Attention(nn.Module):
    """Self-attention of two heads, computed by the function it is given at each call."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.attend = [attend]  # no attribute of the module itself

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.attend[0](q, k, v, **arguments)


def torch_attention(*args: Any, **kwargs: Any) -> Tensor:
    return functional.scaled_dot_product_attention(*args, **kwargs)


def imported_by_name(*args: Any, **kwargs: Any) -> Tensor:
    return scaled_dot_product_attention(*args, **kwargs)


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 2).softmax(-1) @ v


def assert_restored() -> None:
    assert not hasattr(functional.scaled_dot_product_attention, "__wrapped__")
    assert not hasattr(stability.softmax_attention, "__wrapped__")
    assert "softmax" not in vars(Tensor)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


class TestReplaced:
    @pytest.mark.parametrize(
        ("attend", "function"),
        [
            (torch_attention, SDPA),
            (imported_by_name, SDPA),
            (lambda *args: stability.softmax_attention(*args), "stability.softmax_attention"),
        ],
    )
    def test_values_and_gradients_are_those_of_sigmoid_attention(
        self, attend: Callable[..., Tensor], function: str
    ) -> None:
        model, x = Attention(attend), torch.randn(2, 5, 8)
        softmax = model(x)
        with stability.replace_attention(model, "sigmoid") as replaced:
            output = model(x)
            output.square().sum().backward()
        grad = model.project.weight.grad
        assert grad is not None
        model.zero_grad()
        by_hand = Attention(lambda q, k, v: sigmoid_by_hand(q @ k.mT / 2, v, 5))
        by_hand.load_state_dict(model.state_dict())
        expected = by_hand(x)
        expected.square().sum().backward()
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(grad, by_hand.project.weight.grad)
        assert replaced.sites == [ReplacedSite("(root)", function, 1)]
        assert torch.equal(model(x), softmax)
        assert_restored()

    def test_another_model_keeps_its_softmax(self) -> None:
        model, x = Attention(torch_attention), torch.randn(2, 5, 8)
        other = copy.deepcopy(model)
        expected = other(x)
        with stability.replace_attention(model):
            assert torch.equal(other(x), expected)
            sigmoid = model(x)
            assert not torch.allclose(sigmoid, expected)
            with stability.replace_attention(other):
                assert torch.equal(other(x), sigmoid)
            assert torch.equal(other(x), expected)
            assert torch.equal(model(x), sigmoid)

    def test_softmax_is_this_packages(self) -> None:
        model, x = Attention(torch_attention), torch.randn(2, 5, 8)
        expected = model(x)
        with stability.replace_attention(model, "softmax") as replaced:
            torch.testing.assert_close(model(x), expected)
        assert len(replaced.sites) == 1
        own = Attention(lambda *args: stability.sigmoid_attention(*args, bias=-1.0))
        own.load_state_dict(model.state_dict())
        with stability.replace_attention(own, "softmax"):
            torch.testing.assert_close(own(x), expected)

    def test_sigmoid_of_the_models_own_stays_what_it_is(self) -> None:
        model = Attention(lambda *args: stability.sigmoid_attention(*args, bias=-1.0))
        x = torch.randn(2, 5, 8)
        expected = model(x)
        with pytest.warns(UserWarning, match="rerouted nothing"):
            with stability.replace_attention(model, "sigmoid", bias=-3.0):
                assert torch.equal(model(x), expected)

    def test_under_autocast(self) -> None:
        model, x = Attention(torch_attention), torch.randn(2, 5, 8)
        with stability.replace_attention(model), torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        q, k, v = model.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        assert output.dtype is torch.bfloat16
        torch.testing.assert_close(output.float(), sigmoid_by_hand(q @ k.mT / 2, v, 5), rtol=0.05, atol=0.02)

    def test_nothing_is_left_on_the_model(self) -> None:
        model, x = Attention(torch_attention), torch.randn(2, 5, 8)
        expected, keys = model(x), list(vars(model))
        with pytest.raises(KeyError), stability.replace_attention(model):
            model(x)
            assert list(vars(model)) == keys
            assert not model._forward_hooks
            assert not model._forward_pre_hooks
            twin = copy.deepcopy(model)
            torch.save(model, io.BytesIO())
            assert torch.equal(twin(x), expected)
            raise KeyError
        assert_restored()

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointed_modules(self, use_reentrant: bool) -> None:
        inner = Attention(torch_attention)
        model = Outer(lambda x: checkpoint(inner, x, use_reentrant=use_reentrant), inner)
        x = torch.randn(2, 5, 8, requires_grad=True)
        gradients = []
        for module in (model, inner):
            with stability.replace_attention(module) as replaced:
                module(x).square().sum().backward()
            assert [site.calls for site in replaced.sites] == [1]
            assert x.grad is not None
            gradients.append(x.grad)
            x.grad = None
        torch.testing.assert_close(*gradients)


class Outer(nn.Module):
    def __init__(self, function: Callable[..., Any], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.functions = [function]

    def forward(self, *args: Tensor) -> Any:
        return self.functions[0](*args)


def qkv(model: Attention, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(model.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4))


class TestBias:
    x = torch.randn(2, 5, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False

    @pytest.mark.parametrize("kind", ["boolean", "float", "causal"])
    def test_counts_the_keys_that_are_no_padding(self, kind: str) -> None:
        mask = self.mask
        if kind == "causal":
            mask = mask & torch.ones(5, 5, dtype=torch.bool).tril()
        given = torch.zeros(mask.shape).masked_fill(~mask, -1e9) if kind == "float" else mask
        model = Attention(torch_attention)
        with stability.replace_attention(model):
            output = model(self.x, attn_mask=given)
        q, k, v = qkv(model, self.x)
        logits = (q @ k.mT / 2).masked_fill(~mask, float("-inf"))
        torch.testing.assert_close(
            output, sigmoid_by_hand(logits, v, torch.tensor([5.0, 3.0])[:, None, None, None])
        )

    def test_a_number_is_every_rows(self) -> None:
        model = Attention(torch_attention)
        with stability.replace_attention(model, bias=-1.0):
            output = model(self.x, attn_mask=self.mask)
        q, k, v = qkv(model, self.x)
        logits = (q @ k.mT / 2).masked_fill(~self.mask, float("-inf"))
        torch.testing.assert_close(output, sigmoid_by_hand(logits, v, torch.tensor(1.0).exp()))


class TestMultiheadAttention:
    x = torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True

    def by_hand(self, layer: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            functional.linear(x, layer.in_proj_weight, layer.in_proj_bias)
            .unflatten(-1, (3, 2, 4))
            .permute(2, 0, 3, 1, 4)
        )
        num_keys = (~self.padding).sum(1)[:, None, None, None]
        weights = torch.sigmoid(q @ k.mT / 2 - num_keys.log()) * ~self.padding[:, None, None]
        return layer.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights.mean(1)

    @pytest.mark.parametrize("is_frozen", [False, True])  # frozen modules take the fused kernel otherwise
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_with_and_without_weights(self, need_weights: bool, is_frozen: bool) -> None:
        layer = (
            nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(not is_frozen).train(not is_frozen)
        )
        expected, weights = self.by_hand(layer, self.x)
        arguments: dict[str, Any] = {"key_padding_mask": self.padding, "need_weights": need_weights}
        softmax = layer(self.x, self.x, self.x, **arguments)
        with stability.replace_attention(layer) as replaced:
            output, given = layer(self.x, self.x, self.x, **arguments)
        torch.testing.assert_close(output, expected)
        if need_weights:
            torch.testing.assert_close(given, weights)
        else:
            assert given is None
        assert replaced.sites == [
            ReplacedSite("(root)", "torch.nn.MultiheadAttention" if need_weights else SDPA, 1)
        ]
        assert torch.equal(layer(self.x, self.x, self.x, **arguments)[0], softmax[0])
        assert_restored()

    def test_weights_of_softmax_stay(self) -> None:
        layer = nn.MultiheadAttention(8, 2)
        expected = layer(self.x, self.x, self.x)
        with stability.replace_attention(layer, "softmax") as replaced:
            assert torch.equal(layer(self.x, self.x, self.x)[1], expected[1])
        assert len(replaced.sites) == 1

    @pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
    def test_encoder_with_key_padding(self, mode: str) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).train(mode == "train").requires_grad_(mode != "frozen")
        softmax = encoder(self.x, src_key_padding_mask=self.padding)
        with stability.replace_attention(encoder) as replaced:
            output = encoder(self.x, src_key_padding_mask=self.padding)
        expected = self.x
        for each in encoder.layers:
            expected = each.norm1(expected + self.by_hand(each.self_attn, expected)[0])
            expected = each.norm2(expected + each.linear2(each.linear1(expected).relu()))
        torch.testing.assert_close(output, expected)
        assert [(site.layer, site.calls) for site in replaced.sites] == [
            ("layers.0.self_attn", 1), ("layers.1.self_attn", 1)
        ]  # fmt: skip
        assert torch.equal(encoder(self.x, src_key_padding_mask=self.padding), softmax)

    def test_parts_of_the_model_that_are_called_alone(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
        model = nn.Sequential(layer)
        with stability.replace_attention(model):
            assert torch.equal(layer(self.x), model(self.x))
            layer(self.x)
            assert torch.backends.mha.get_fastpath_enabled()


class TestRefused:
    x = torch.randn(2, 5, 8)

    def test_softmax_by_hand(self) -> None:
        model = nn.Sequential(nn.Identity(), Attention(softmax_by_hand))
        expected = model(self.x)
        other = Attention(torch_attention)
        with stability.replace_attention(other):
            other(self.x)
            assert torch.equal(model(self.x), expected)
        with pytest.raises(NotImplementedError, match=r"in 1 \(torch.softmax\).*stability.sigmoid_attention"):
            with stability.replace_attention(model):
                model(self.x)
        assert torch.equal(model(self.x), expected)
        assert_restored()

    def test_modules_named_for_attention_without_any(self) -> None:
        model = Attention(lambda q, k, v: q @ (k.mT @ v))
        with pytest.raises(NotImplementedError, match="makes no attention call that is known"):
            with stability.replace_attention(model):
                model(self.x)

    def test_attention_that_is_declared(self) -> None:
        def declared(q: Tensor, k: Tensor, v: Tensor, mechanism: Any) -> Tensor:
            report_attention(q, k, mechanism=mechanism)
            return (q @ k.mT).softmax(-1) @ v

        model = Attention(declared)
        with pytest.raises(NotImplementedError, match="declared, and computed by hand"):
            with stability.replace_attention(model):
                model(self.x, mechanism="softmax")
        with pytest.warns(UserWarning, match="rerouted nothing"), stability.replace_attention(model):
            model(self.x, mechanism="sigmoid")

    def test_arguments_that_have_no_counterpart(self) -> None:
        nested = torch.nested.nested_tensor([torch.rand(2, 3, 4)] * 2, layout=torch.jagged).transpose(1, 2)
        model = Outer(lambda x: torch_attention(nested, nested, nested))
        with pytest.raises(NotImplementedError, match=r"\(root\) .*nested"):
            with stability.replace_attention(model):
                model(self.x)

    def test_a_bias_for_each_key_under_softmax(self) -> None:
        model = Attention(lambda *args: stability.sigmoid_attention(*args, score_bias=torch.zeros(5)))
        with pytest.raises(NotImplementedError, match="no score_bias"):
            with stability.replace_attention(model, "softmax"):
                model(self.x)

    def test_checkpointed_functions(self) -> None:
        model = Outer(lambda x: checkpoint(torch_attention, x, x, x, use_reentrant=True))
        x = self.x.clone().requires_grad_()
        with stability.replace_attention(model):
            output = model(x)
            with pytest.raises(NotImplementedError, match="Checkpoint modules"):
                output.sum().backward()

    def test_checkpointed_modules_of_other_models_are_not(self) -> None:
        model, inner = Attention(torch_attention), Attention(torch_attention)
        other = Outer(lambda x: checkpoint(inner, x, use_reentrant=True))
        x = self.x.clone().requires_grad_()
        with stability.replace_attention(model):
            model(x)
            other(x).sum().backward()
        assert inner.project.weight.grad is not None

    def test_compiled_models(self) -> None:
        model = Outer(lambda x: torch_attention(x, x, x), nn.Linear(1, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(model, backend="eager")
            with pytest.raises(ValueError, match="`model` is compiled"):
                with stability.replace_attention(compiled):
                    pass
            with stability.replace_attention(model):
                model(self.x)
                with pytest.raises(NotImplementedError, match=r"\(root\) is compiled"):
                    compiled(self.x)
                with pytest.raises(NotImplementedError, match=r"\(root\) is compiled, traced"):
                    torch.jit.trace(model, self.x)
            model.compile(backend="eager")
            with pytest.raises(ValueError, match="`model` is compiled"):
                with stability.replace_attention(model):
                    pass

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": 3}, TypeError, "`model` must be a torch.nn.Module; got int"),
            ({"mechanism": "linear"}, ValueError, '`mechanism` must be "softmax" or "sigmoid"; got \'lin'),
            ({"mechanism": "softmax", "bias": 1.0}, ValueError, "`bias` belongs to sigmoid"),
            ({"bias": "1"}, TypeError, "`bias` must be a number or None; got str"),
            ({"model": nn.Sequential(nn.DataParallel(nn.Identity()))}, ValueError, "`0` in `model` is comp"),
        ],
    )
    def test_bad_arguments(self, arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            with stability.replace_attention(**{"model": nn.Identity(), **arguments}):
                pass

    def test_functions_held_by_modules(self) -> None:
        model = nn.Sequential(nn.Identity())
        model[0].attend = functional.scaled_dot_product_attention
        with pytest.raises(ValueError, match="`0` in `model` holds.*'attend'"):
            with stability.replace_attention(model):
                pass

    def test_twice(self) -> None:
        model = nn.Sequential(Attention(torch_attention))
        with stability.replace_attention(model):
            model(self.x)
            for same in (model, model[0]):
                with pytest.raises(ValueError, match="replaced already"), stability.replace_attention(same):
                    pass
            model(self.x)
        with stability.replace_attention(model):
            model(self.x)

    def test_a_model_without_attention_is_warned_of(self) -> None:
        with pytest.warns(UserWarning, match="rerouted nothing: Linear"):
            with stability.replace_attention(nn.Linear(1, 1)):
                pass


def test_interrupts_leave_nothing_behind() -> None:
    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = Outer(interrupt)
    with stability.replace_attention(model):
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(1))
        model.functions = [lambda x: torch_attention(x, x, x)]
        model(torch.ones(1, 1, 1, 1))
        assert torch.backends.mha.get_fastpath_enabled()
    assert_restored()
