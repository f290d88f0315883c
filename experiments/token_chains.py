"""Token sequences from random Markov chains: learnable in a hundred steps, and better with attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Of the four successors of a token; what is left over, a uniformly random token follows.
SUCCESSOR_PROBABILITIES = (0.45, 0.225, 0.1125, 0.1125)


def chain_batches(
    *, vocabulary: int, num_chains: int, batch_size: int, tokens: int, seed: int
) -> Iterator[Tensor]:
    """An endless stream of sequences, each from one of several Markov chains.

    The chains share the vocabulary and differ in the successors of every token. With one chain the last
    token says all there is to know of the next; with several a model must also find out, from the tokens
    before, which chain it is in: a use for attention.

    Args:
        vocabulary: Number of different tokens.
        num_chains: Markov chains; each sequence keeps to one, drawn at random.
        batch_size: Sequences per batch.
        tokens: Length of a sequence.
        seed: Of the chains and of every draw; the stream depends on the arguments alone.

    Yields:
        [batch_size, tokens] int64 on the CPU.

    Example:
        >>> batches = chain_batches(vocabulary=16, num_chains=2, batch_size=3, tokens=8, seed=0)
        >>> next(batches).shape
        torch.Size([3, 8])
    """
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.tensor([*SUCCESSOR_PROBABILITIES, 1 - sum(SUCCESSOR_PROBABILITIES)])
    num_successors = len(SUCCESSOR_PROBABILITIES)
    successors = torch.randint(vocabulary, (num_chains, vocabulary, num_successors), generator=generator)
    while True:
        chain = torch.randint(num_chains, (batch_size,), generator=generator)
        # Where the choice is no successor, the token drawn beforehand stays.
        batch = torch.randint(vocabulary, (batch_size, tokens), generator=generator)
        choices = torch.multinomial(probabilities, batch_size * tokens, replacement=True, generator=generator)
        for i, choice in enumerate(choices.view(tokens, batch_size)[1:], start=1):
            chosen = successors[chain, batch[:, i - 1], choice.clamp(max=num_successors - 1)]
            batch[:, i] = torch.where(choice < num_successors, chosen, batch[:, i])
        yield batch
