from __future__ import annotations

import pytest
import torch

from experiments.cell_transformer import CellTransformer, CellTransformerConfig, masked_value_loss

VARIANTS = [(mechanism, position) for mechanism in ("softmax", "sigmoid") for position in ("pre", "post")]


def tiny(**changes) -> CellTransformer:
    torch.manual_seed(0)
    return CellTransformer(CellTransformerConfig.preset("tiny", num_genes=30, **changes))


def inputs(tokens: int = 9) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    genes = torch.randint(30, (2, tokens), generator=generator)
    values = torch.rand(2, tokens, generator=generator)
    mask = torch.rand(2, tokens, generator=generator) < 0.3
    return genes, values, mask, torch.tensor([tokens, 5])


def test_both_mechanisms_start_from_the_same_weights():
    softmax, sigmoid = tiny(attention="softmax"), tiny(attention="sigmoid")
    assert softmax.state_dict().keys() == sigmoid.state_dict().keys()
    for name, parameter in softmax.state_dict().items():
        assert torch.equal(parameter, sigmoid.state_dict()[name]), name
    assert not torch.equal(softmax(*inputs()), sigmoid(*inputs()))


@pytest.mark.parametrize(("mechanism", "position"), VARIANTS)
def test_what_lies_behind_the_length_changes_nothing(mechanism, position):
    model = tiny(attention=mechanism, norm_position=position)
    genes, values, mask, lengths = inputs()
    expected = model(genes[1:, :5], values[1:, :5], mask[1:, :5], lengths[1:])
    values = values.clone()
    values[1, 5:] = 1e6
    torch.testing.assert_close(model(genes, values, mask, lengths)[1:, :5], expected)


@pytest.mark.parametrize(("mechanism", "position"), VARIANTS)
def test_cells_are_sets(mechanism, position):
    model = tiny(attention=mechanism, norm_position=position)
    genes, values, mask, _ = inputs()
    lengths = torch.tensor([9, 9])
    order = torch.randperm(9)
    permuted = model(genes[:, order], values[:, order], mask[:, order], lengths)
    torch.testing.assert_close(permuted, model(genes, values, mask, lengths)[:, order])


def test_hidden_values_are_not_read():
    model = tiny()
    genes, values, mask, lengths = inputs()
    changed = torch.where(mask, values + 1, values)
    assert torch.equal(model(genes, changed, mask, lengths), model(genes, values, mask, lengths))


@pytest.mark.parametrize(("mechanism", "position"), VARIANTS)
def test_every_parameter_gets_a_gradient(mechanism, position):
    model = tiny(attention=mechanism, norm_position=position)
    genes, values, mask, lengths = inputs()
    masked_value_loss(model(genes, values, mask, lengths), values, mask).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_checkpointing_changes_no_gradient(mechanism):
    genes, values, mask, lengths = inputs()
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny(attention=mechanism, checkpoint_attention=is_checkpointed)
        masked_value_loss(model(genes, values, mask, lengths), values, mask).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_initial_scales_are_those_of_gpt2():
    torch.manual_seed(0)
    model = CellTransformer(CellTransformerConfig.preset("laptop", num_genes=765))
    block = model.blocks[0]
    assert block.attention.query.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.output.weight.std().item() == pytest.approx(0.02 / 10**0.5, rel=0.05)
    assert model.mask_embedding.std().item() == pytest.approx(0.02, rel=0.2)
    assert not block.attention.query.bias.any()


@pytest.mark.parametrize(
    ("preset", "num_genes", "blocks", "total"),
    [("laptop", 765, 991_360, 1_090_049), ("160m", 10_000, 151_154_688, 161_400_833)],
)
def test_preset_sizes(preset, num_genes, blocks, total):
    with torch.device("meta"):
        counts = CellTransformer(CellTransformerConfig.preset(preset, num_genes=num_genes)).parameter_counts()
    assert counts["total"] == total
    final_norm = 2 * CellTransformerConfig.preset(preset, num_genes=1).embed_dim
    assert counts["attention"] + counts["mlp"] + counts["norms"] - final_norm == blocks


def test_module_names_say_what_they_are():
    names = dict(tiny().named_modules())
    assert {"gene_embedding", "blocks.1.attention.query", "blocks.1.mlp.hidden", "value_head"} <= names.keys()


def test_loss_counts_hidden_values_only():
    predictions, targets = torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, False, True]])
    assert masked_value_loss(predictions, targets, mask).item() == 5.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "linear"}, "`attention` must be one of"),
        ({"norm_position": "both"}, "`norm_position` must be 'pre' or 'post'; got 'both'"),
        ({"num_layers": 0}, "`num_layers` must be at least 1; got 0"),
        ({"num_heads": 3}, "`embed_dim` must be a multiple of `num_heads`; got 16 and 3"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        CellTransformerConfig.preset("tiny", num_genes=30, **changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match="`name` must be one of .*; got 'huge'"):
        CellTransformerConfig.preset("huge", num_genes=30)
