"""Tiny random checkpoints of every family, made with transformers. Norms and biases are random too, so that a forgotten
one shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = dict(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear-rope-bias": (
        "LlamaConfig",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "mistral-window": ("MistralConfig", {"sliding_window": 20, "head_dim": 24}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 20, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 20, "num_hidden_layers": 7}),
}


def make(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> tuple[Path, Any]:
    """Writes the checkpoint (float32 safetensors) and returns its folder and the transformers model."""
    import torch
    import transformers

    config_name, special = FAMILIES[name]
    config = getattr(transformers, config_name)(**{**SHAPE, **special, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 0.15)
    path = folder / name
    model.save_pretrained(path)
    return path, model


def reference_logprobs(model: Any, ids: list[int]) -> Any:
    """(len(ids), vocabulary) by transformers, float32."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy()
