"""GGUF hyper-parameters -> the keys of the Hugging Face config of the same family, so that a family is described once.

Two differences are in the weights themselves: files of architecture `llama` store the rows of q and k in the order of
interleaved rotary pairs, and Gemma's norm weights already have their one added.
"""

from __future__ import annotations

import numpy as np

from pagoda.base.errors import ModelFileError, UnsupportedModel
from pagoda.files.gguf import GgufFile
from pagoda.loader.tensor import SourceTensor
from pagoda.loader.weights import Transform
from pagoda.models.hf import HfConfig
from pagoda.models.spec import ModelSpec

__all__ = ["ARCHITECTURES", "hf_config", "row_order"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def hf_config(file: GgufFile) -> HfConfig:
    """The config of a GGUF model. UnsupportedModel for architectures we do not have, ModelFileError for missing keys."""
    name = file.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedModel(f"{file.path}: GGUF architecture `{name}` is not supported; known: {', '.join(ARCHITECTURES)}")
    meta = file.metadata

    def number(key: str, default: int | None = None) -> int:
        value = meta.get_int(f"{name}.{key}", default)
        if value is None:
            raise ModelFileError(f"lacks the metadata `{name}.{key}`", path=file.path)
        return value

    heads = number("attention.head_count")
    hidden = number("embedding_length")
    values = {
        "architectures": [ARCHITECTURES[name]],
        "vocab_size": file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else number("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", hidden // heads),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": meta.get_float(f"{name}.attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": _weight_type(file),
        "rope_theta": meta.get_float(f"{name}.rope.freq_base", 1e6 if name == "gemma3" else 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "rope_scaling": _rope_scaling(file, name),
    }
    if "rope_freqs.weight" in file.tensors:
        values["rope_factors"] = tuple(float(f) for f in file.array("rope_freqs.weight"))
    window = meta.get_int(f"{name}.attention.sliding_window")
    if name.startswith("gemma"):
        values |= {
            "sliding_window": window or 4096,
            "norm_plus_one": False,
            "query_pre_attn_scalar": _gemma_scalar(values, name),
            "attn_logit_softcapping": meta.get_float(f"{name}.attn_logit_softcapping"),
            "final_logit_softcapping": meta.get_float(f"{name}.final_logit_softcapping"),
        }
    elif window and name == "llama":
        values |= {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    return HfConfig(values)


def _gemma_scalar(values: dict[str, object], name: str) -> float:
    """GGUF does not say what queries are scaled by: the head's width, but for the 27B models of both generations."""
    heads, layers = int(str(values["num_attention_heads"])), values["num_hidden_layers"]
    is_27b = (name, layers) in (("gemma2", 46), ("gemma3", 62))
    return int(str(values["hidden_size"])) / heads if is_27b else float(str(values["head_dim"]))


def _rope_scaling(file: GgufFile, name: str) -> dict[str, object] | None:
    kind = file.metadata.get_str(f"{name}.rope.scaling.type")
    if kind in (None, "none", ""):
        return None
    return {"rope_type": kind, "factor": file.metadata.get_float(f"{name}.rope.scaling.factor", 1.0)}


def _weight_type(file: GgufFile) -> str:
    """The commonest type of the file's matrices, for the start-up report and --dtype auto."""
    counts: dict[str, int] = {}
    for info in file.tensors.values():
        if len(info.shape) == 2:
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    commonest = max(counts, key=lambda key: counts[key]) if counts else "F32"
    return plain.get(commonest, commonest)


def row_order(file: GgufFile, spec: ModelSpec) -> Transform | None:
    """A transform for the loader: q and k rows of `llama` files back from interleaved pairs to halves; else None."""
    if file.architecture != "llama":
        return None

    def transform(name: str, source: SourceTensor) -> SourceTensor:
        parts = name.split(".")
        if parts[0] != "layers" or parts[-2] not in ("q", "k") or parts[-3] != "attention":
            return source
        width = spec.blocks[int(parts[1])].attention.head_dim
        num_rows = source.shape[0]
        order = np.arange(num_rows).reshape(num_rows // width, width // 2, 2).swapaxes(1, 2).reshape(-1)
        return source.rows(order)

    return transform
