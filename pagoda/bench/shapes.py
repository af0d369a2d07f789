"""Shapes of models that people run, without their weights: folders with a config.json, for `--load-format dummy`.

    pagoda bench engine --shape llama-3.1-8b
    python benchmarks/gpu_shapes.py llama-3.1-8b FOLDER && pagoda serve FOLDER/llama-3.1-8b --load-format dummy --tokenizer ...
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "write_shape"]

_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 40960, "hidden_act": "silu", "attention_bias": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "rope_scaling": _LLAMA3_ROPE, "max_position_embeddings": 131072,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "qwen3-0.6b": {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny": {  # for trying a benchmark out
        **_QWEN3, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True, "max_position_embeddings": 512,
    },
}  # fmt: skip


def write_shape(name: str, folder: Path) -> Path:
    """Writes the shape's config.json below `folder`, and returns where. KeyError for a name that is none."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[name], indent=1), encoding="utf-8")
    return path
