"""Attention in a whole training: the contenders, the model they share, and a step of it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import stability
from experiments.attention_contenders import Case, Contender
from experiments.cell_batches import MaskedBatch
from experiments.cell_transformer import (
    Attention,
    CellTransformer,
    CellTransformerConfig,
    masked_value_loss,
)
from experiments.overhead_training import LEARNING_RATE, Training

Mode = Literal["eager", "compiled"]
NUM_GENES = 10_000
_MASK_SHARE = 0.25


def speed_contenders(case: Case, device: str) -> list[Contender]:
    """Who can train a case on this device, and gets the padding right.

    SDPA takes no lengths. Padded keys are hidden from it by a mask, which its flash backend does not take.
    FlashAttention-2 over lengths is there twice: by `stability.softmax_attention`, and by `varlen_attn` where
    torch has it, with nothing of ours but the copies between padded and packed tokens.

    A packed case has none of them: who trains it computes no padding in any layer. Its sequences go to a
    kernel for packed ones or, one by one, to the kernels of the other cases.

    Args:
        case: What is computed.
        device: "cpu" or "cuda".

    Returns:
        Ours first.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.is_packed:
        return _packed_contenders(case.valid_lengths, device)
    lengths, mask = None, None
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths, device=device)
        mask = (torch.arange(case.tokens, device=device) < lengths[:, None])[:, None, None]
    sigmoid, softmax = (
        partial(function, key_lengths=lengths, query_lengths=lengths)
        for function in (stability.sigmoid_attention, stability.softmax_attention)
    )
    sdpa = partial(scaled_dot_product_attention, attn_mask=mask)

    def backend(choice: SDPBackend) -> Callable[[], AbstractContextManager[Any]]:
        return partial(sdpa_kernel, choice)

    found = [
        Contender("sigmoid, accurate", "ours", sigmoid),
        Contender("softmax, torch's choice", "softmax", sdpa),
    ]
    if device == "cpu":
        return found
    found.insert(1, Contender("sigmoid, fast", "ours", partial(sigmoid, precision="fast")))
    if case.lengths is None:
        found.append(Contender("softmax, flash", "softmax", sdpa, backend(SDPBackend.FLASH_ATTENTION)))
    else:
        found.append(Contender("softmax, flash over lengths", "softmax", softmax))
        if _has_varlen():
            packing = PackingAttention(case.lengths, case.tokens, device)
            found.append(Contender("softmax, flash varlen", "softmax", packing))
    return [
        *found,
        Contender("softmax, cuDNN", "softmax", sdpa, backend(SDPBackend.CUDNN_ATTENTION)),
        Contender("softmax, memory-efficient", "softmax", sdpa, backend(SDPBackend.EFFICIENT_ATTENTION)),
    ]


def _packed_contenders(lengths: Sequence[int], device: str) -> list[Contender]:
    packed = PackedSequences(lengths, device)
    found = [
        Contender("sigmoid, varlen", "ours", packed.sigmoid),
        Contender("sigmoid, one by one", "ours", partial(packed.one_by_one, stability.sigmoid_attention)),
        Contender("softmax, one by one", "softmax", partial(packed.one_by_one, scaled_dot_product_attention)),
    ]
    if device == "cuda" and _has_varlen():
        found.append(Contender("softmax, flash varlen", "softmax", packed.flash))
    return found


def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


@contextmanager
def contenders_compile() -> Iterator[None]:
    """Every contender is compiled, and to its own code.

    They compile the same Python: past its limit dynamo would run the last ones eagerly, and the cache of what
    AOTAutograd made does not see which backend of SDPA was asked for, so that all would get the first one's.
    """
    with (
        torch._dynamo.config.patch(recompile_limit=64),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


class PackedSequences:
    """Attention within each of several sequences that lie one behind the other.

    Query, key, value and output of its methods are [1, heads, tokens of all sequences, head_dim].

    Args:
        lengths: Of the sequences.
        device: Of the tensors.
    """

    def __init__(self, lengths: Sequence[int], device: str) -> None:
        self.lengths = list(lengths)
        self.starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        self.longest = max(lengths)

    def sigmoid(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """By this project's kernel for packed sequences."""
        tensors = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))
        output = stability.sigmoid_attention_varlen(
            *tensors,
            cu_seqlens_q=self.starts, cu_seqlens_k=self.starts,
            max_seqlen_q=self.longest, max_seqlen_k=self.longest,
        )  # fmt: skip
        return output.transpose(0, 1).unsqueeze(0)

    def flash(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax by torch's kernel for packed sequences, FlashAttention-2."""
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))
        output: Any = varlen_attn(query, key, value, self.starts, self.starts, self.longest, self.longest)
        packed: Tensor = output.transpose(0, 1).unsqueeze(0)
        return packed

    def one_by_one(self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each sequence by a call of its own: `attend` takes and gives [1, heads, its tokens, head_dim]."""
        pieces = zip(*(each.split(self.lengths, dim=2) for each in (query, key, value)), strict=True)
        return torch.cat([attend(*piece) for piece in pieces], dim=2)


class PackingAttention:
    """Softmax attention over padded sequences by torch's kernel for packed ones.

    Where each valid token is, and where each sequence begins, is computed once and not in the step.

    Args:
        lengths: Valid tokens of each sequence.
        tokens: With the padding.
        device: Of the tensors.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, device: str) -> None:
        is_token = torch.arange(tokens) < torch.tensor(lengths)[:, None]
        self.places = is_token.flatten().nonzero().squeeze(1).to(device)
        self.packed = PackedSequences(lengths, device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] each; padding rows of the output are zeros."""
        batch, heads, tokens, head_dim = query.shape
        query, key, value = (
            each.transpose(1, 2).flatten(0, 1).index_select(0, self.places).transpose(0, 1).unsqueeze(0)
            for each in (query, key, value)
        )
        output = self.packed.flash(query, key, value).squeeze(0).transpose(0, 1)
        padded = output.new_zeros(batch * tokens, heads, head_dim).index_copy(0, self.places, output)
        return padded.view(batch, tokens, heads, head_dim).transpose(1, 2)


class SharedTraining:
    """One model and optimizer that every contender trains with its own attention.

    Args:
        case: Batch, tokens, heads and padding; heads × head_dim is the width.
        num_layers: Blocks.
        device: "cpu" or "cuda"; on "cuda" the forward pass runs under bfloat16 autocast.
    """

    def __init__(self, case: Case, num_layers: int, device: str) -> None:
        config = CellTransformerConfig(
            num_genes=NUM_GENES,
            embed_dim=case.heads * case.head_dim,
            num_layers=num_layers,
            num_heads=case.heads,
        )
        self.device = device
        torch.manual_seed(0)
        with torch.device(device):
            self.model = CellTransformer(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=device == "cuda")
        self.batch = _random_batch(case, device)

    def step_of(self, contender: Contender, mode: Mode, backend: str) -> Callable[[], None]:
        """A training step with a contender's attention.

        Args:
            contender: Who.
            mode: "compiled" compiles the block, once for all layers.
            backend: Of torch.compile.

        Returns:
            Forward, backward and optimizer step, to be called any number of times.
        """
        # The copy has modules of its own, on the same parameters.
        model = copy.deepcopy(self.model, {id(each): each for each in self.model.parameters()})

        def attend(
            query: Tensor, key: Tensor, value: Tensor, *, key_lengths: Any, query_lengths: Any
        ) -> Tensor:
            return contender.attend(query, key, value)  # it has the lengths of this case

        for module in model.modules():
            if isinstance(module, Attention):
                module.function = attend
        if mode == "compiled":
            from torch._dynamo import lookup_backend

            def compiler(*graph: Any) -> Any:
                return lookup_backend(backend)(*graph)

            # One for all blocks of a contender and of no other: dynamo shares code between callers with one
            # compiler, and its guards do not see which backend of SDPA was asked for.
            for block in model.blocks:
                block.compile(dynamic=False, backend=compiler)
        training = Training(model, self.optimizer, self._loss)

        def step() -> None:
            with contender.around():
                training.step(lambda loss: None)

        return step

    def _loss(self, model: nn.Module, step: int) -> Tensor:
        batch = self.batch
        is_cuda = self.device == "cuda"
        with torch.autocast("cuda", dtype=torch.bfloat16) if is_cuda else nullcontext():
            predictions = model(batch.genes, batch.values, batch.mask, batch.lengths)
        return masked_value_loss(predictions, batch.targets, batch.mask)


def _random_batch(case: Case, device: str) -> MaskedBatch:
    """Time does not depend on what is in the cells."""
    generator = torch.Generator(device).manual_seed(0)
    shape = case.stored
    genes = torch.randint(NUM_GENES, shape, generator=generator, device=device)
    targets = torch.rand(shape, generator=generator, device=device)
    mask = torch.rand(shape, generator=generator, device=device) < _MASK_SHARE
    lengths = None
    if case.lengths is not None and not case.is_packed:
        lengths = torch.tensor(case.lengths, device=device)
        mask &= torch.arange(case.tokens, device=device) < lengths[:, None]
    return MaskedBatch(genes, targets.masked_fill(mask, 0.0), mask, lengths, targets)
