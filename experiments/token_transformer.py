"""A small causal language model on torch's fused attention, and token sequences it can learn.

The model is plain PyTorch as anyone would write it: nothing in it knows of probes, and its attention weights
exist nowhere outside the fused kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.cell_transformer import MLP


@dataclass(frozen=True)
class TokenTransformerConfig:
    """Sizes of a language model; the defaults hold 3.45 million parameters.

    Attributes:
        vocabulary: Number of different tokens.
        max_tokens: Longest sequence.
        embed_dim: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Attention heads per block; divides embed_dim.
    """

    vocabulary: int = 512
    max_tokens: int = 128
    embed_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"`embed_dim` must be a multiple of `num_heads`; got {self.embed_dim} and {self.num_heads}."
            )


class TokenTransformer(nn.Module):
    """Pre-LN causal transformer with learned positions; seed torch before the constructor.

    Weights start as in GPT-2 (Radford et al., 2019): normal with standard deviation 0.02, the projections
    that write to the residual stream divided by √(2 num_layers), biases zero.

    Args:
        config: Sizes.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = TokenTransformer(TokenTransformerConfig(vocabulary=16, embed_dim=8))
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.embed_dim)
        self.position_embedding = nn.Embedding(config.max_tokens, config.embed_dim)
        self.blocks = nn.ModuleList(
            TokenBlock(config.embed_dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, config.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                writes_residual = name.endswith("output.weight")
                std = 0.02 / (2 * config.num_layers) ** 0.5 if writes_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score every possible next token.

        Args:
            tokens: [B, n] int64, n at most `max_tokens`.

        Returns:
            [B, n, vocabulary] unnormalised log-probabilities.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


class TokenBlock(nn.Module):
    """Causal self-attention and MLP, each behind a layer norm and beside a residual connection."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = CausalAttention(embed_dim, num_heads)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.mlp = MLP(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, embed_dim] to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CausalAttention(nn.Module):
    """Multi-head causal self-attention by torch's fused `scaled_dot_product_attention`."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.output = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, embed_dim] to the same shape."""
        # [B, n, embed_dim] → [B, H, n, head_dim]
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        heads = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(heads.transpose(1, 2).flatten(-2))
