"""Mistral: Llama with a sliding window over all layers (7B v0.1), or without (later ones)."""

from __future__ import annotations

from pagoda.loader.names import HF_DECODER
from pagoda.models.hf import HfConfig
from pagoda.models.llama import dense_spec
from pagoda.models.spec import ModelSpec

__all__ = ["NAMES", "spec"]

NAMES = HF_DECODER


def spec(config: HfConfig) -> ModelSpec:
    return dense_spec(config, windows=config.windows(uniform=True), qkv_bias=False)
