"""Small random models of many architectures, with the attention they are known to have from their configs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

SDPA = "torch.nn.functional.scaled_dot_product_attention"
SOFTMAX = "torch.softmax"

TOKENS = 7
VOCABULARY = 64

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 64,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "init_std": 0.2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VISION = {**TEXT, "image_size": 16, "patch_size": 4}
SPEECH = {
    **TEXT,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}


def _ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY - 3, (2, tokens))


def text() -> dict[str, Tensor]:
    """Two sequences, the second of them padded."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def unpadded_text() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def pairs() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": _ids(5)}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(2, 3, 16, 16)}


def sounds() -> dict[str, Tensor]:
    return {"input_values": torch.rand(2, 200)}


def hidden_layers(config: Any) -> int:
    return config.num_hidden_layers


def encoder_and_decoder(config: Any) -> int:
    """One attention a layer of the encoder, two a layer of the decoder."""
    encoder = getattr(config, "encoder_layers", None) or config.num_layers
    decoder = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    return encoder + 2 * decoder


Family = Literal["encoder", "decoder", "encoder-decoder", "vision", "audio", "no attention"]


@dataclass(frozen=True)
class Architecture:
    """A model of Hugging Face transformers.

    Attributes:
        name: Prefix of its classes.
        config: Arguments of its configuration.
        batch: Makes its keyword arguments.
        sites: From the configuration, the number of attention calls in a forward pass.
        unseen: How many of them cannot be seen.
        has_sdpa: Whether it has an "sdpa" implementation beside "eager".
        weights: Implementations whose weights are those that the eager one puts out, one a call.
        also: Kinds of sites beside the one the implementation is about.
        slow: Left to `make test-all`.
        family: What sort of model it is.
    """

    name: str
    config: dict[str, Any]
    batch: Callable[[], dict[str, Tensor]] = text
    sites: Callable[[Any], int] = hidden_layers
    unseen: bool = False
    has_sdpa: bool = True
    weights: tuple[str, ...] = ("sdpa", "eager")
    also: tuple[str, ...] = ()
    slow: bool = False
    family: Family = "encoder"

    def build(self, implementation: str) -> nn.Module:
        """A random model; the same one after the same seed."""
        import transformers

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity_error()
            config = getattr(transformers, f"{self.name}Config")(**self.config)
            config._attn_implementation = implementation
            return getattr(transformers, f"{self.name}Model")(config)

    @property
    def implementations(self) -> tuple[str, ...]:
        return ("sdpa", "eager") if self.has_sdpa else ("eager",)


@dataclass(frozen=True)
class TorchArchitecture:
    """A model of ``torch.nn``; the fields are those of :class:`Architecture`."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    num_sites: int
    also: tuple[str, ...] = ()
    family: Family = "encoder"

    implementations = ("sdpa",)
    weights = ()
    unseen = slow = False

    def build(self, implementation: str) -> nn.Module:
        """A random model; the same one after the same seed."""
        return self.make()

    def sites(self, config: Any) -> int:
        """How many attention calls a forward pass makes."""
        return self.num_sites


def _sequences(*names: str) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.rand(2, TOKENS, 32) for name in names}


def _causal_sequences() -> dict[str, Any]:
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[1, 5:] = True
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return {**_sequences("src")(), "mask": mask, "src_key_padding_mask": padding}


def _encoder(**named: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 37, batch_first=True, **named)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


TORCH_ARCHITECTURES = [
    TorchArchitecture("nn.TransformerEncoder", _encoder, _sequences("src"), 2),
    TorchArchitecture(
        "nn.TransformerEncoder, masked, norm first", lambda: _encoder(norm_first=True), _causal_sequences, 2
    ),
    TorchArchitecture(
        "nn.TransformerDecoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 37, batch_first=True), 2),
        _sequences("tgt", "memory"),
        4,
        family="decoder",
    ),
    TorchArchitecture(
        "nn.Transformer",
        lambda: nn.Transformer(32, 4, 2, 1, 37, batch_first=True),
        _sequences("src", "tgt"),
        4,
        family="encoder-decoder",
    ),
    TorchArchitecture(
        "nn.MultiheadAttention",
        lambda: nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True),
        lambda: {**_sequences("query", "key", "value")(), "need_weights": False},
        1,
    ),
    TorchArchitecture(
        "nn.MultiheadAttention with its weights",
        lambda: nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True),
        _sequences("query", "key", "value"),
        1,
        also=(SOFTMAX,),
    ),
    TorchArchitecture(
        "nn.LSTM", lambda: nn.LSTM(32, 16, batch_first=True), _sequences("input"), 0, family="no attention"
    ),
]


def _vision_and_text_layers(config: Any) -> int:
    return config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers


def _small_clip_batch() -> dict[str, Tensor]:
    return {**text(), **images()}


_decoder = functools.partial(Architecture, family="decoder")
_encoder_decoder = functools.partial(
    Architecture, family="encoder-decoder", batch=pairs, sites=encoder_and_decoder
)
_vision = functools.partial(Architecture, family="vision", batch=images)
_audio = functools.partial(Architecture, family="audio", batch=sounds)

ARCHITECTURES = [
    Architecture("Bert", TEXT),
    Architecture("Roberta", TEXT),
    Architecture("XLMRoberta", TEXT, slow=True),
    Architecture(
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37},
    ),
    Architecture("Electra", {**TEXT, "embedding_size": 16}),
    Architecture("Albert", {**TEXT, "embedding_size": 16}),
    Architecture("MPNet", TEXT, has_sdpa=False),
    Architecture("DebertaV2", TEXT, has_sdpa=False),
    Architecture("Deberta", TEXT, has_sdpa=False, slow=True),
    Architecture("ConvBert", {**TEXT, "embedding_size": 32}, has_sdpa=False, slow=True),
    Architecture("BigBird", {**TEXT, "attention_type": "original_full"}, has_sdpa=False, slow=True),
    Architecture("Camembert", TEXT, slow=True),
    Architecture(
        "ModernBert",
        {**TEXT, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
         "eos_token_id": 2},
        slow=True,
    ),
    Architecture(
        "XLNet",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37},
        has_sdpa=False,
        weights=(),
    ),
    Architecture(
        "Longformer", {**TEXT, "attention_window": 4}, has_sdpa=False, weights=(), unseen=True
    ),
    _decoder("GPT2", GPT),
    _decoder("GPTNeoX", TEXT),
    _decoder(
        "GPTNeo",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
         "attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 64},
        has_sdpa=False,
    ),
    _decoder("GPTJ", {**GPT, "rotary_dim": 4}, has_sdpa=False),
    _decoder("CodeGen", {**GPT, "rotary_dim": 4}, has_sdpa=False, slow=True),
    _decoder("GPTBigCode", GPT, slow=True),
    _decoder("Llama", {**TEXT, "num_key_value_heads": 2}),
    _decoder("Mistral", {**TEXT, "num_key_value_heads": 2, "sliding_window": 4}),
    _decoder("Qwen2", {**TEXT, "num_key_value_heads": 2}),
    _decoder("Qwen3", {**TEXT, "num_key_value_heads": 2, "head_dim": 8}, slow=True),
    _decoder(
        "Gemma2",
        {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8,
         "attn_logit_softcapping": 2.0, "sliding_window": 4},
        has_sdpa=False,
    ),
    _decoder("Gemma", {**TEXT, "num_key_value_heads": 1, "head_dim": 8}, slow=True),
    _decoder("Phi", TEXT),
    _decoder("Phi3", {**TEXT, "pad_token_id": 0}, slow=True),
    _decoder("Olmo", TEXT, slow=True),
    _decoder("Granite", TEXT, slow=True),
    _decoder("Cohere", TEXT, slow=True),
    _decoder(
        "Mixtral",
        {**TEXT, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1,
         "intermediate_size": 48},
    ),
    _decoder(
        "OPT",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "ffn_dim": 37, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
    ),
    _decoder(
        "Bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        has_sdpa=False,
    ),
    _decoder(
        "Falcon",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "alibi": True, "initializer_range": 0.2},
        weights=("eager",),  # which adds its position biases twice
    ),
    _decoder("Mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2}, has_sdpa=False),
    _encoder_decoder("T5", T5),
    _encoder_decoder("MT5", T5, slow=True),
    _encoder_decoder("Bart", BART),
    _encoder_decoder("Marian", {**BART, "pad_token_id": 0, "decoder_start_token_id": 0}),
    _encoder_decoder("Pegasus", BART, slow=True),
    _encoder_decoder("MBart", BART, slow=True),
    _encoder_decoder("Blenderbot", BART, slow=True),
    _encoder_decoder("M2M100", BART, slow=True),
    _vision("ViT", VISION),
    _vision("DeiT", VISION),
    _vision("Dinov2", VISION, slow=True),
    _vision("Beit", VISION, slow=True),
    _vision(
        "Swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
         "window_size": 4, "initializer_range": 0.2},
        sites=lambda config: sum(config.depths),
    ),
    # Its pooling head is an nn.MultiheadAttention of its own.
    _vision(
        "SiglipVision",
        VISION,
        also=(SOFTMAX,),
        sites=lambda config: config.num_hidden_layers + 1,
        weights=(),
        slow=True,
    ),
    _vision(
        "CLIP",
        {"text_config": {**TEXT, "eos_token_id": VOCABULARY - 1}, "vision_config": VISION},
        batch=_small_clip_batch,
        sites=_vision_and_text_layers,
        weights=(),
    ),
    _audio("Wav2Vec2", SPEECH),
    _audio("Hubert", SPEECH, slow=True),
    _audio(
        "Whisper",
        {**BART, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16, "pad_token_id": 0,
         "decoder_start_token_id": 1},
        batch=lambda: {"input_features": torch.rand(2, 8, 20), "decoder_input_ids": _ids(5)},
        sites=encoder_and_decoder,
    ),
    Architecture(
        "Perceiver",
        {"d_latents": 32, "num_latents": 8, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
         "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
        batch=lambda: {"inputs": torch.rand(2, TOKENS, 32)},
        sites=lambda config: config.num_blocks * config.num_self_attends_per_block + 1,
        has_sdpa=False,
        weights=(),
        slow=True,
    ),
    Architecture(
        "Reformer",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16,
         "axial_pos_embds": False, "max_position_embeddings": 64, "num_buckets": 2,
         "attn_layers": ["local", "lsh"]},
        batch=unpadded_text,
        sites=lambda config: len(config.attn_layers),
        unseen=True,
        has_sdpa=False,
        weights=(),
        slow=True,
    ),
    Architecture("Rwkv", MAMBA, batch=unpadded_text, unseen=True, has_sdpa=False, weights=(),
                 family="decoder"),
    Architecture("Mamba", MAMBA, batch=unpadded_text, sites=lambda config: 0, has_sdpa=False,
                 weights=(), family="no attention"),
    Architecture("FNet", TEXT, batch=unpadded_text, sites=lambda config: 0, has_sdpa=False,
                 weights=(), family="no attention"),
]  # fmt: skip
