"""The default model in every form a peer wants, all made from the one Q4_1 file, so that all have the same weights.

    Q4_1 file --(our reader, dequantized)--> bf16 Hugging Face folder --(optimum-intel)--> OpenVINO fp16, int8, int4
         `-----(llama-quantize)-----------> GGUF files F32, BF16, Q8_0, Q4_0

bf16 rounds the dequantized values; everything of 8 and 4 bits rounds them again, but for the file as it is.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.peers.environments import CACHE, ensure, llama_program, python_of, run_logged
from pagoda.files.gguf import GgufFile, read_gguf
from pagoda.files.hub import resolve
from pagoda.kernels.gguf_blocks import BLOCK_SIZES, dequantize
from pagoda.models.gguf import hf_config

__all__ = ["MODELS", "default_file", "gguf", "hf_folder", "hf_name", "openvino_folder", "unpermute"]

MODELS = CACHE / "models"
_TOKENIZER = "import sys, transformers as t; t.AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).save_pretrained(sys.argv[3])"
_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OPENVINO = {
    "bf16": ("--weight-format", "fp16"),
    "8bit": ("--weight-format", "int8"),
    "4bit": ("--weight-format", "int4", "--group-size", "64", "--ratio", "1.0", "--sym"),
}


def default_file() -> Path:
    """The GGUF file that `pagoda serve` would take."""
    return Path(resolve(None).path)


def gguf(kind: str) -> Path:
    """The model as GGUF of type `kind` (F32, BF16, Q8_0, Q4_0, or Q4_1: the file as it is). PeerAbsent without llama.cpp."""
    if kind == "Q4_1":
        return default_file()
    path = MODELS / f"default-{kind}.gguf"
    if not path.is_file():
        ensure("llama.cpp")
        MODELS.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        run_logged([str(llama_program("llama-quantize")), "--allow-requantize", str(default_file()), str(part), kind, "2"], MODELS / "log")
        part.rename(path)
    return path


def hf_folder() -> Path:
    """The dequantized model as a Hugging Face folder in bf16, tokenizer included."""
    folder = MODELS / "default-bf16"
    if not (folder / "model.safetensors").is_file():
        ensure("transformers")
        folder.mkdir(parents=True, exist_ok=True)
        source = default_file()
        words = [str(python_of("transformers")), "-c", _TOKENIZER, str(source.parent), source.name, str(folder)]
        run_logged(words, MODELS / "log")
        file = read_gguf(source)
        _write_config(file, folder)
        _write_weights(file, folder / "model.safetensors")
    return folder


def openvino_folder(precision: str) -> Path:
    """OpenVINO's representation: weights fp16 (computed in bf16), int8, or int4 in groups of 64."""
    folder = MODELS / f"openvino-{precision}"
    if not (folder / "openvino_model.bin").is_file():
        source = hf_folder()
        ensure("openvino-export")
        cli = python_of("openvino-export").with_name("optimum-cli")
        task = ("--task", "text-generation-with-past")
        run_logged([str(cli), "export", "openvino", "--model", str(source), *task, *_OPENVINO[precision], str(folder)], MODELS / "log")
    return folder


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. KeyError for a tensor llama models lack."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_PARTS[parts[2]]}.weight"
    return f"{_WHOLE[parts[0]]}.weight"


def unpermute(w_NK: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k of a `llama` GGUF file, pairs interleaved, back to the two halves that Hugging Face has."""
    half = w_NK.shape[0] // num_heads // 2
    return w_NK.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(w_NK.shape)


def _write_config(file: GgufFile, folder: Path) -> None:
    values = {key: value for key, value in hf_config(file).values.items() if value is not None}
    values |= {"model_type": file.architecture, "torch_dtype": "bfloat16", "hidden_act": "silu", "mlp_bias": False, "use_cache": True}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "config.json").write_text(json.dumps(values | ids, indent=1), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(ids), encoding="utf-8")


def _write_weights(file: GgufFile, path: Path) -> None:
    meta = file.metadata
    heads = {"attn_q": meta.get_int("llama.attention.head_count"), "attn_k": meta.get_int("llama.attention.head_count_kv")}
    arrays = {}
    for name, info in file.tensors.items():
        values = dequantize(info.dtype, file.raw(name)) if info.dtype in BLOCK_SIZES else file.array(name).astype(np.float32)
        values = values.reshape(info.shape)
        part = name.split(".")[-2]
        if num_heads := heads.get(part):
            values = unpermute(values, num_heads)
        arrays[hf_name(name)] = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16))
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    part_path = path.with_suffix(".part")
    with open(part_path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            out.write(array.tobytes())
    part_path.rename(path)
