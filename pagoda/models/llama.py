"""Llama 1 to 3.x and the many models that kept its shape (SmolLM, TinyLlama, Yi, ...)."""

from __future__ import annotations

from pagoda.layers.attention import AttentionSpec
from pagoda.layers.mlp import MlpSpec
from pagoda.loader.names import HF_DECODER
from pagoda.models.hf import HfConfig
from pagoda.models.spec import BlockSpec, ModelSpec

__all__ = ["NAMES", "dense_spec", "spec"]

NAMES = HF_DECODER


def dense_spec(
    config: HfConfig, *, windows: list[int], qkv_bias: bool, out_bias: bool = False, qk_norm: bool = False, mlp_bias: bool = False
) -> ModelSpec:
    """Llama's block with the switches its descendants turn."""
    head_dim = config.head_dim
    rope = config.rope()
    heads = config.int("num_attention_heads")

    def block(window: int) -> BlockSpec:
        attention = AttentionSpec(
            num_heads=heads,
            num_kv_heads=config.int("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope,
            window=window,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
        )
        return BlockSpec(attention, MlpSpec(config.int("intermediate_size"), config.activation(), bias=mlp_bias))

    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.int("vocab_size"),
        hidden_size=config.int("hidden_size"),
        blocks=tuple(block(window) for window in windows),
        norm_eps=config.float("rms_norm_eps", 1e-6),
        max_model_len=config.int("max_position_embeddings", 2048),
        dtype=config.dtype,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def spec(config: HfConfig) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    return dense_spec(
        config, windows=[0] * config.num_layers, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False))
    )
