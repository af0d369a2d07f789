"""Qwen 2 and 2.5: Llama with biases on q, k and v; optionally a window in the upper layers."""

from __future__ import annotations

from pagoda.loader.names import HF_DECODER
from pagoda.models.hf import HfConfig
from pagoda.models.llama import dense_spec
from pagoda.models.spec import ModelSpec

__all__ = ["NAMES", "qwen_windows", "spec"]

NAMES = HF_DECODER


def qwen_windows(config: HfConfig) -> list[int]:
    """`layer_types`, or its older spelling: a window from layer `max_window_layers` on, if `use_sliding_window`."""
    if not config.get("use_sliding_window", False):
        return [0] * config.num_layers
    if config.get("layer_types"):
        return config.windows(uniform=False)
    window, first = config.int("sliding_window"), int(config.get("max_window_layers", config.num_layers))
    return [window if i >= first else 0 for i in range(config.num_layers)]


def spec(config: HfConfig) -> ModelSpec:
    return dense_spec(config, windows=qwen_windows(config), qkv_bias=True)
