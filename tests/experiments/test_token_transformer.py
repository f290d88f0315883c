from __future__ import annotations

import math

import pytest
import torch

from experiments.token_chains import SUCCESSOR_PROBABILITIES, chain_batches
from experiments.token_transformer import TokenTransformer, TokenTransformerConfig


def test_defaults_hold_the_parameters_that_peers_were_measured_with():
    model = TokenTransformer(TokenTransformerConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_454_464


def test_a_token_does_not_see_the_ones_after_it():
    model = TokenTransformer(TokenTransformerConfig(vocabulary=16, embed_dim=8))
    tokens = torch.randint(16, (1, 8))
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 16
    torch.testing.assert_close(model(tokens)[0, :5], model(changed)[0, :5])
    assert not torch.allclose(model(tokens)[0, 5:], model(changed)[0, 5:])


def test_training_starts_near_a_uniform_guess():
    config = TokenTransformerConfig(vocabulary=64, embed_dim=32)
    tokens = torch.randint(64, (4, 33))
    logits = TokenTransformer(config)(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(64), abs=0.1)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="`embed_dim` must be a multiple of `num_heads`; got 10 and 4"):
        TokenTransformerConfig(embed_dim=10)


def test_chains_depend_on_the_seed_alone():
    arguments = {"vocabulary": 16, "num_chains": 2, "batch_size": 3, "tokens": 20}
    first, again, other = (chain_batches(**arguments, seed=seed) for seed in (0, 0, 1))
    for _ in range(2):
        batch = next(first)
        assert torch.equal(batch, next(again))
        assert not torch.equal(batch, next(other))


@pytest.mark.parametrize("num_chains", [1, 3])
def test_successors_come_as_often_as_they_should(num_chains):
    vocabulary = 1000  # a token hardly ever follows by chance
    batches = chain_batches(vocabulary=vocabulary, num_chains=num_chains, batch_size=64, tokens=2000, seed=0)
    batch = next(batches)
    pairs, counts = torch.unique(batch.unfold(1, 2, 1).reshape(-1, 2), dim=0, return_counts=True)
    # Of everything that followed a token, the share of its 4 · chains most frequent successors.
    frequent = 0
    for token in range(vocabulary):
        mine = counts[pairs[:, 0] == token]
        frequent += int(mine.sort(descending=True).values[: 4 * num_chains].sum())
    assert frequent / int(counts.sum()) == pytest.approx(sum(SUCCESSOR_PROBABILITIES), abs=0.03)
