"""Qwen 3: q and k are normalised per head, and the biases of Qwen 2 are gone."""

from __future__ import annotations

from pagoda.loader.names import HF_DECODER
from pagoda.models.hf import HfConfig
from pagoda.models.llama import dense_spec
from pagoda.models.qwen2 import qwen_windows
from pagoda.models.spec import ModelSpec

__all__ = ["NAMES", "spec"]

NAMES = HF_DECODER


def spec(config: HfConfig) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    return dense_spec(config, windows=qwen_windows(config), qkv_bias=bias, out_bias=bias, qk_norm=True)
