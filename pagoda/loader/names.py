"""Tensor names of a checkpoint -> ours, as a table of patterns.

`{i}` stands for a layer number on both sides. A row whose right side is None is known and not needed. A rule matches a
name's stem; `.weight` and `.bias` are carried over.

    ours: embed  norm  head  layers.{i}.attention_norm  layers.{i}.attention.{q,k,v,o,q_norm,k_norm}
          layers.{i}.attention_post_norm  layers.{i}.mlp_norm  layers.{i}.mlp.{gate,up,down}  layers.{i}.mlp_post_norm
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["HF_DECODER", "NameMap", "gguf_names"]

HF_DECODER: dict[str, str | None] = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "lm_head": "head",
    "model.layers.{i}.input_layernorm": "layers.{i}.attention_norm",
    "model.layers.{i}.self_attn.q_proj": "layers.{i}.attention.q",
    "model.layers.{i}.self_attn.k_proj": "layers.{i}.attention.k",
    "model.layers.{i}.self_attn.v_proj": "layers.{i}.attention.v",
    "model.layers.{i}.self_attn.o_proj": "layers.{i}.attention.o",
    "model.layers.{i}.self_attn.q_norm": "layers.{i}.attention.q_norm",
    "model.layers.{i}.self_attn.k_norm": "layers.{i}.attention.k_norm",
    "model.layers.{i}.self_attn.rotary_emb.inv_freq": None,
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.gate_proj": "layers.{i}.mlp.gate",
    "model.layers.{i}.mlp.up_proj": "layers.{i}.mlp.up",
    "model.layers.{i}.mlp.down_proj": "layers.{i}.mlp.down",
}
"""Llama's names, which most families kept."""

HF_SANDWICH: dict[str, str | None] = HF_DECODER | {
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.attention_post_norm",
    "model.layers.{i}.pre_feedforward_layernorm": "layers.{i}.mlp_norm",
    "model.layers.{i}.post_feedforward_layernorm": "layers.{i}.mlp_post_norm",
}
"""Blocks with norms before and after (Gemma 2 and 3): the second norm of Llama's name is another one here."""

_GGUF: dict[str, str | None] = {
    "token_embd": "embed",
    "output_norm": "norm",
    "output": "head",
    "rope_freqs": None,
    "blk.{i}.attn_norm": "layers.{i}.attention_norm",
    "blk.{i}.attn_q": "layers.{i}.attention.q",
    "blk.{i}.attn_k": "layers.{i}.attention.k",
    "blk.{i}.attn_v": "layers.{i}.attention.v",
    "blk.{i}.attn_output": "layers.{i}.attention.o",
    "blk.{i}.attn_q_norm": "layers.{i}.attention.q_norm",
    "blk.{i}.attn_k_norm": "layers.{i}.attention.k_norm",
    "blk.{i}.ffn_norm": "layers.{i}.mlp_norm",
    "blk.{i}.ffn_gate": "layers.{i}.mlp.gate",
    "blk.{i}.ffn_up": "layers.{i}.mlp.up",
    "blk.{i}.ffn_down": "layers.{i}.mlp.down",
    "blk.{i}.post_attention_norm": "layers.{i}.attention_post_norm",
    "blk.{i}.post_ffw_norm": "layers.{i}.mlp_post_norm",
}


def gguf_names() -> Mapping[str, str | None]:
    """GGUF has one naming for all families."""
    return _GGUF


class NameMap:
    """`name_map("model.layers.3.mlp.up_proj.weight")` -> `layers.3.mlp.up.weight`; None: not needed; KeyError: unknown."""

    def __init__(self, rules: Mapping[str, str | None]) -> None:
        self._rules = rules

    def __call__(self, name: str) -> str | None:
        stem, dot, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, dot, kind = name, "", ""
        found = re.search(r"(?<=\.)\d+(?=\.)", stem)
        pattern = stem[: found.start()] + "{i}" + stem[found.end() :] if found else stem
        ours = self._rules[pattern]
        if ours is None:
            return None
        return (ours.replace("{i}", found.group()) if found else ours) + dot + kind
