"""Gemma 3 (text): five windowed layers to a full one, two rotary bases, norms on q and k instead of soft caps."""

from __future__ import annotations

from pagoda.loader.names import HF_SANDWICH
from pagoda.models.gemma2 import sandwich_spec
from pagoda.models.hf import HfConfig
from pagoda.models.spec import ModelSpec

__all__ = ["NAMES", "spec"]

NAMES = HF_SANDWICH


def spec(config: HfConfig) -> ModelSpec:
    values = {"sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh", **config.values}
    if values.get("layer_types") is None:
        period = int(values.get("sliding_window_pattern") or values.get("_sliding_window_pattern") or 6)
        values["layer_types"] = [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(config.num_layers)
        ]
    config = HfConfig(values)
    windows = config.windows(uniform=False)
    full = config.rope(layer_type="full_attention", theta=1e6)
    if "rope_parameters" in values:
        local = config.rope(layer_type="sliding_attention")
    else:  # transformers 4 kept the local base in a key of its own, never scaled
        local = HfConfig({"head_dim": config.head_dim, "rope_theta": values.get("rope_local_base_freq") or 10000.0}).rope()
    return sandwich_spec(config, windows=windows, ropes=[local if window else full for window in windows], qk_norm=True)
