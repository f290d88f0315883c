"""The bidirectional cell transformer: the blocks of every task, and the model of masked-value regression.

In that task a cell is a set of (gene, expression value) tokens without an order, so there is no position
embedding and no causal mask. Some values are hidden behind a mask embedding and the model predicts them.
Softmax and sigmoid attention share every parameter, so the two variants of one seed start from bitwise the
same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stability.attention import sigmoid_attention, softmax_attention

Mechanism = Literal["softmax", "sigmoid"]
MECHANISMS: dict[Mechanism, Any] = {"softmax": softmax_attention, "sigmoid": sigmoid_attention}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 16, "num_layers": 2, "num_heads": 2},
    "laptop": {"embed_dim": 128, "num_layers": 5, "num_heads": 2},
    "160m": {"embed_dim": 1024, "num_layers": 12, "num_heads": 16},
}


@dataclass(frozen=True)
class CellTransformerConfig:
    """Everything that determines a cell transformer except its random seed.

    Attributes:
        num_genes: Size of the gene vocabulary.
        attention: "softmax" or "sigmoid"; changes no parameter.
        embed_dim: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Attention heads per block; divides embed_dim.
        norm_position: "pre" normalises the input of each sublayer, "post" the sum after it.
        init_std: Standard deviation of the initial weights (GPT-2 uses 0.02).
        checkpoint_attention: Recompute the attention call in backward instead of keeping its tensors.
    """

    num_genes: int
    attention: Mechanism = "softmax"
    embed_dim: int = 128
    num_layers: int = 5
    num_heads: int = 2
    norm_position: Literal["pre", "post"] = "pre"
    init_std: float = 0.02
    checkpoint_attention: bool = False

    def __post_init__(self) -> None:
        if self.attention not in MECHANISMS:
            raise ValueError(f"`attention` must be one of {sorted(MECHANISMS)}; got {self.attention!r}.")
        if self.norm_position not in ("pre", "post"):
            raise ValueError(f"`norm_position` must be 'pre' or 'post'; got {self.norm_position!r}.")
        for name in ("num_genes", "embed_dim", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"`embed_dim` must be a multiple of `num_heads`; got {self.embed_dim} and {self.num_heads}."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CellTransformerConfig:
        """A named size.

        "laptop" holds 1.0 million parameters in its blocks, "160m" 151 million (attention 50 M, MLP 101 M);
        the gene embedding adds num_genes × embed_dim, 10 M for the 10,000 genes of the 160m stress test.
        "tiny" is for tests.

        Args:
            name: A key of `PRESETS`.
            **changes: Fields to set, `num_genes` at least.

        Returns:
            The configuration.

        Raises:
            ValueError: The name is unknown or a field is out of range.

        Example:
            >>> CellTransformerConfig.preset("160m", num_genes=10_000, attention="sigmoid").embed_dim
            1024
        """
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {sorted(PRESETS)}; got {name!r}.")
        return cls(**{**PRESETS[name], **changes})


class CellEncoder(nn.Module):
    """Blocks between a task's embeddings and its head, which subclasses add before they call `initialise`.

    Weights start as in GPT-2 (Radford et al., 2019): normal with `init_std`, the projections that write to
    the residual stream divided by √(2 num_layers), biases zero. Seed torch before the constructor.

    Args:
        config: Sizes and attention mechanism.
        **embeddings: The task's embedding layers, by attribute name. They come before the blocks, so that
            layers, parameters and random draws are in the order of the forward pass.
    """

    def __init__(self, config: CellTransformerConfig, **embeddings: nn.Module) -> None:
        super().__init__()
        self.config = config
        for name, embedding in embeddings.items():
            self.add_module(name, embedding)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        # Post-LN blocks already end in a norm.
        self.final_norm = nn.LayerNorm(config.embed_dim) if config.norm_position == "pre" else nn.Identity()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draws the initial weights of the whole model."""
        std = self.config.init_std
        residual_projections: list[nn.Linear] = []
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=std)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
            if isinstance(module, Block):
                residual_projections += [module.attention.output, module.mlp.output]
        for projection in residual_projections:
            projection.weight.div_((2 * self.config.num_layers) ** 0.5)

    def encode(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """What the blocks make of embedded tokens.

        Args:
            x: [B, n, embed_dim].
            lengths: [B] int64, tokens of each cell; what lies behind them changes nothing. None: all n.

        Returns:
            [B, n, embed_dim], normalised; that of padding means nothing.
        """
        for block in self.blocks:
            x = block(x, lengths)
        return self.final_norm(x)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each part: embeddings, attention, mlp, norms, head, total.

        Example:
            >>> model = CellTransformer(CellTransformerConfig.preset("laptop", num_genes=765))
            >>> counts = model.parameter_counts()
            >>> counts["embeddings"], counts["attention"], counts["mlp"], counts["total"]
            (98304, 330240, 658560, 1090049)
        """
        counts = {"embeddings": 0, "attention": 0, "mlp": 0, "norms": 0, "head": 0}
        for name, parameter in self.named_parameters():
            if "embedding" in name:
                part = "embeddings"
            elif "norm" in name:
                part = "norms"
            else:
                part = next(part for part in ("attention", "mlp", "head") if part in name)
            counts[part] += parameter.numel()
        return {**counts, "total": sum(counts.values())}


class CellTransformer(CellEncoder):
    """Predicts the hidden expression values of a cell from its genes and the values that are shown.

    Args:
        config: Sizes and attention mechanism.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = CellTransformer(CellTransformerConfig.preset("tiny", num_genes=50, attention="sigmoid"))
        >>> genes, values = torch.arange(8).expand(2, 8), torch.rand(2, 8)
        >>> mask = torch.arange(8).expand(2, 8) < 3
        >>> model(genes, values, mask, lengths=torch.tensor([8, 5])).shape
        torch.Size([2, 8])
    """

    gene_embedding: nn.Embedding
    value_embedding: nn.Linear

    def __init__(self, config: CellTransformerConfig) -> None:
        super().__init__(
            config,
            gene_embedding=nn.Embedding(config.num_genes, config.embed_dim),
            value_embedding=nn.Linear(1, config.embed_dim),
        )
        self.mask_embedding = nn.Parameter(torch.empty(config.embed_dim))
        self.value_head = nn.Linear(config.embed_dim, 1)
        self.initialise()
        with torch.no_grad():
            self.mask_embedding.normal_(std=config.init_std)

    def forward(self, genes: Tensor, values: Tensor, mask: Tensor, lengths: Tensor | None) -> Tensor:
        """Predict every token's expression value.

        Args:
            genes: [B, n] int64, gene indices in [0, num_genes).
            values: [B, n] float, log1p expression; ignored where `mask` is True.
            mask: [B, n] bool, True where the value is hidden from the model.
            lengths: [B] int64, tokens of each cell; what lies behind them changes nothing. None: all n.

        Returns:
            [B, n] predicted values; those of padding mean nothing.
        """
        values = values.to(self.value_embedding.weight.dtype)  # of weights in bfloat16
        value_tokens = self.value_embedding(values.unsqueeze(-1))
        value_tokens = torch.where(
            mask.unsqueeze(-1), self.mask_embedding.to(value_tokens.dtype), value_tokens
        )
        x = self.encode(self.gene_embedding(genes) + value_tokens, lengths)
        return self.value_head(x).squeeze(-1)


class Block(nn.Module):
    """Attention and MLP, each with a residual connection and a layer norm before (pre) or after (post) it."""

    def __init__(self, config: CellTransformerConfig) -> None:
        super().__init__()
        self.is_pre_norm = config.norm_position == "pre"
        self.attention_norm = nn.LayerNorm(config.embed_dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.embed_dim)
        self.mlp = MLP(config.embed_dim)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, n, embed_dim] to the same shape."""
        if self.is_pre_norm:
            x = x + self.attention(self.attention_norm(x), lengths)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, lengths))
        return self.mlp_norm(x + self.mlp(x))


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of each cell, softmax or sigmoid."""

    def __init__(self, config: CellTransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.function = MECHANISMS[config.attention]
        self.is_checkpointed = config.checkpoint_attention
        self.query = nn.Linear(config.embed_dim, config.embed_dim)
        self.key = nn.Linear(config.embed_dim, config.embed_dim)
        self.value = nn.Linear(config.embed_dim, config.embed_dim)
        self.output = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, n, embed_dim] to the same shape."""
        # [B, n, embed_dim] → [B, H, n, head_dim]
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        if self.is_checkpointed:
            heads = checkpoint(self._attend, query, key, value, lengths, use_reentrant=False)
        else:
            heads = self._attend(query, key, value, lengths)
        return self.output(heads.transpose(1, 2).flatten(-2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
        return self.function(query, key, value, key_lengths=lengths, query_lengths=lengths)


class MLP(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(embed_dim, 4 * embed_dim)
        self.output = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, embed_dim] to the same shape."""
        return self.output(nn.functional.gelu(self.hidden(x)))


def masked_value_loss(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the hidden values, (1/|M|) Σ_{i∈M} (prediction_i − target_i)².

    Args:
        predictions: [B, n] float.
        targets: [B, n] float, the true log1p expression.
        mask: [B, n] bool, at least one True.

    Returns:
        0-d float32 loss.

    Example:
        >>> masked_value_loss(torch.tensor([[1.0, 9.0]]), torch.zeros(1, 2), torch.tensor([[True, False]]))
        tensor(1.)
    """
    # A sum over all tokens rather than an index by mask: the index's size would make CUDA wait.
    squared = (predictions.float() - targets).square()
    return torch.where(mask, squared, 0.0).sum() / mask.sum()
