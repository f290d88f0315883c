"""Models of Hugging Face transformers, rerouted, against their twins with a dense sigmoid of the test's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stability
from tests.probes.zoo.architectures import ARCHITECTURES, SDPA, Architecture

transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["Bert", "GPT2", "Llama", "Mistral", "T5", "Bart", "ViT"]


def architecture(name: str) -> Architecture:
    return next(each for each in ARCHITECTURES if each.name == name)


def dense_sigmoid(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Takes transformers' "eager" masks: 0 or the dtype's least number, or None where nothing is masked."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        logits = logits + position_bias
    num_keys = torch.tensor(key.shape[2])
    if attention_mask is not None:
        logits = logits + attention_mask
        num_keys = (attention_mask == 0).any(dim=2).sum(-1)[..., None, None]
    return (torch.sigmoid(logits - num_keys.log()) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def dense() -> Iterator[str]:
    """The name of the dense implementation, while transformers knows it."""
    from transformers import masking_utils, modeling_utils

    attention, masks = modeling_utils.AttentionInterface, masking_utils.AttentionMaskInterface
    attention.register("dense_sigmoid", dense_sigmoid)
    masks.register("dense_sigmoid", masking_utils.eager_mask)
    yield "dense_sigmoid"
    del attention._global_mapping["dense_sigmoid"], masks._global_mapping["dense_sigmoid"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_models_compute_sigmoid_attention(name: str, implementation: str, dense: str) -> None:
    model = architecture(name).build(implementation).eval()
    batch = architecture(name).batch()
    by_hand = architecture(name).build(dense).eval()
    by_hand.load_state_dict(model.state_dict())
    softmax = model(**batch)[0]

    with stability.replace_attention(model, "sigmoid") as replaced:
        output = model(**batch)[0]
        output.square().mean().backward()

    expected = by_hand(**batch)[0]
    expected.square().mean().backward()
    assert not torch.allclose(output, softmax, atol=1e-3)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for (parameter_name, parameter), twin in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-3, atol=1e-5, msg=parameter_name)
    assert len(replaced.sites) == architecture(name).sites(model.config)
    assert {(site.function, site.calls) for site in replaced.sites} == {(SDPA, 1)}
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch)[0], softmax)


def test_models_in_flex_attention(dense: str) -> None:
    model, batch = architecture("Llama").build("flex_attention"), architecture("Llama").batch()
    by_hand = architecture("Llama").build(dense)
    by_hand.load_state_dict(model.state_dict())
    with stability.replace_attention(model):
        torch.testing.assert_close(model(**batch)[0], by_hand(**batch)[0], rtol=1e-4, atol=1e-5)


def test_a_model_of_the_same_configuration_keeps_its_attention() -> None:
    model, batch = architecture("Llama").build("eager"), architecture("Llama").batch()
    other = type(model)(model.config)
    expected = other(**batch)[0]
    implementations = []
    with stability.replace_attention(model):
        handle = model.layers[0].register_forward_hook(
            lambda *_: implementations.append(model.config._attn_implementation)
        )
        model(**batch)
        handle.remove()
        assert implementations == ["stability"]
        assert model.config._attn_implementation == "eager"  # between forward passes nothing is on the model
        assert torch.equal(other(**batch)[0], expected)
        assert copy.deepcopy(model).config._attn_implementation == "eager"


def test_gradient_checkpointing_changes_nothing() -> None:
    model, batch = architecture("Llama").build("sdpa").train(), architecture("Llama").batch()
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with stability.replace_attention(model) as replaced:
            model(**batch, use_cache=False)[0].square().mean().backward()
        assert [site.calls for site in replaced.sites] == [1, 1]
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_generation_with_a_bias_of_its_own_is_that_of_whole_sequences() -> None:
    config = architecture("Llama").build("sdpa").config
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 60, (1, 5))
    with stability.replace_attention(model, bias=-2.0), torch.no_grad():
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        for length in range(5, 9):
            assert model(generated[:, :length]).logits[0, -1].argmax() == generated[0, length]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Gemma2", r"layer 0's Gemma2Attention cannot be rerouted: its logits are soft-capped \(softcap\)"),
        ("Bloom", r"h.0.self_attention \(torch.softmax\) .* written by hand"),
        ("Rwkv", r"blocks.0.attention \(RwkvSelfAttention\) .* no attention call that is known"),
    ],
)
def test_what_cannot_be_rerouted_is_refused(name: str, message: str) -> None:
    model, batch = architecture(name).build("eager").eval(), architecture(name).batch()
    expected = model(**batch)[0]
    with pytest.raises(NotImplementedError, match=message), stability.replace_attention(model):
        model(**batch)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(**batch)[0], expected)
