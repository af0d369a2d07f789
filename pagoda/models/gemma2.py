"""Gemma 2: norms around both halves of a block, soft caps, every other layer a window, scaled embeddings, GELU."""

from __future__ import annotations

from pagoda.layers.attention import AttentionSpec
from pagoda.layers.mlp import MlpSpec
from pagoda.layers.rope import RopeSpec
from pagoda.loader.names import HF_SANDWICH
from pagoda.models.hf import HfConfig
from pagoda.models.spec import BlockSpec, ModelSpec

__all__ = ["NAMES", "sandwich_spec", "spec"]

NAMES = HF_SANDWICH


def sandwich_spec(config: HfConfig, *, windows: list[int], ropes: list[RopeSpec], qk_norm: bool) -> ModelSpec:
    """The block Gemma 2 and 3 share; `windows` and `ropes` are per layer."""
    heads = config.int("num_attention_heads")

    def block(window: int, rope: RopeSpec) -> BlockSpec:
        attention = AttentionSpec(
            num_heads=heads,
            num_kv_heads=config.int("num_key_value_heads", heads),
            head_dim=config.head_dim,
            scale=config.float("query_pre_attn_scalar", 256) ** -0.5,
            rope=rope,
            window=window,
            soft_cap=float(config.get("attn_logit_softcapping", 0.0)),
            qkv_bias=bool(config.get("attention_bias", False)),
            out_bias=bool(config.get("attention_bias", False)),
            qk_norm=qk_norm,
        )
        mlp = MlpSpec(config.int("intermediate_size"), config.activation("hidden_activation"))
        return BlockSpec(attention, mlp, post_norms=True)

    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.int("vocab_size"),
        hidden_size=config.int("hidden_size"),
        blocks=tuple(block(window, rope) for window, rope in zip(windows, ropes, strict=True)),
        norm_eps=config.float("rms_norm_eps", 1e-6),
        max_model_len=config.int("max_position_embeddings", 8192),
        dtype=config.dtype,
        norm_plus_one=bool(config.get("norm_plus_one", True)),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        embed_scale=config.int("hidden_size") ** 0.5,
        logit_soft_cap=float(config.get("final_logit_softcapping", 0.0)),
    )


def spec(config: HfConfig) -> ModelSpec:
    values = config.values
    if values.get("layer_types") is None:
        kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(config.num_layers)]
        config = HfConfig({"sliding_window": 4096, **values, "layer_types": kinds})
    if "attn_logit_softcapping" not in values:  # the class defaults of a config.json that omits them
        config = HfConfig({**config.values, "attn_logit_softcapping": 50.0})
    if "final_logit_softcapping" not in values:
        config = HfConfig({**config.values, "final_logit_softcapping": 30.0})
    if "hidden_activation" not in values:
        config = HfConfig({**config.values, "hidden_activation": "gelu_pytorch_tanh"})
    return sandwich_spec(config, windows=config.windows(uniform=False), ropes=[config.rope()] * config.num_layers, qk_norm=False)
