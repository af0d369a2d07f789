"""Reading a Hugging Face config: typed values, and the two spellings (transformers 4 and 5) of what moved.

GGUF metadata is translated into the same keys (`models/gguf.py`), so a family is described once.
"""

from __future__ import annotations

from typing import Any

from pagoda.base.errors import UnsupportedModel
from pagoda.layers.rope import RopeSpec

__all__ = ["HfConfig"]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


class HfConfig:
    """A `config.json` with errors that name the key."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @property
    def architecture(self) -> str:
        names = self.values.get("architectures") or []
        return str(names[0]) if names else ""

    @property
    def dtype(self) -> str:
        return str(self.values.get("dtype") or self.values.get("torch_dtype") or "float32").removeprefix("torch.")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def int(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UnsupportedModel(f"config.json: `{key}` must be a positive integer, got {value!r}")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UnsupportedModel(f"config.json: `{key}` must be a number, got {value!r}")
        return float(value)

    @property
    def num_layers(self) -> int:
        return self.int("num_hidden_layers")

    @property
    def head_dim(self) -> int:
        return self.int("head_dim", self.int("hidden_size") // self.int("num_attention_heads"))

    def activation(self, key: str = "hidden_act") -> Any:
        name = self.get(key, "silu")
        if name not in ACTIVATIONS:
            raise UnsupportedModel(f"config.json: activation `{name}` is not supported; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def rope(self, *, layer_type: str | None = None, theta: float = 10000.0) -> RopeSpec:
        """The rotary embedding of all layers, or of one layer type; `theta` where the config names none."""
        values = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        if layer_type and isinstance(values.get(layer_type), dict):
            values = dict(values[layer_type])
        theta = float(values.get("rope_theta") or self.get("rope_theta") or theta)
        kind = str(values.get("rope_type") or values.get("type") or "default")
        partial = float(values.get("partial_rotary_factor") or self.get("partial_rotary_factor") or 1.0)
        spec = RopeSpec(theta, int(self.head_dim * partial) // 2 * 2, factors=tuple(self.get("rope_factors", ())))
        if kind == "default":
            return spec
        if kind == "linear":
            return RopeSpec(theta, spec.rotary_dim, "linear", float(values["factor"]))
        if kind == "llama3":
            return RopeSpec(
                theta, spec.rotary_dim, "llama3", float(values["factor"]), float(values["low_freq_factor"]),
                float(values["high_freq_factor"]), int(values["original_max_position_embeddings"]),
            )  # fmt: skip
        raise UnsupportedModel(f"config.json: rope scaling `{kind}` is not supported; known: default, linear, llama3")

    def windows(self, *, uniform: bool) -> list[int]:
        """Per layer, tokens a query may see (0: all). `layer_types` decides; without it all layers, if `uniform`, or none."""
        window = int(self.get("sliding_window") or 0)
        types = self.get("layer_types")
        if types is None:
            return [window if uniform else 0] * self.num_layers
        if len(types) != self.num_layers or not set(types) <= {"full_attention", "sliding_attention"}:
            raise UnsupportedModel("config.json: `layer_types` must name full_attention or sliding_attention for every layer")
        if "sliding_attention" in types and not window:
            raise UnsupportedModel("config.json: `layer_types` asks for sliding_attention, but there is no `sliding_window`")
        return [window if kind == "sliding_attention" else 0 for kind in types]
