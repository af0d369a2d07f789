"""From a path to a description of the model, and from the description to a loaded model.

One row per architecture: name in config.json -> family module. Families are imported when asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pagoda.base.config import ModelConfig
from pagoda.base.errors import ConfigError, ModelFileError, UnsupportedModel
from pagoda.base.mesh import Mesh
from pagoda.base.registry import nearest
from pagoda.files.gguf import GgufFile, read_gguf
from pagoda.files.safetensors import SafetensorsFile, read_safetensors
from pagoda.loader.names import NameMap, gguf_names
from pagoda.loader.place import HOST, Place
from pagoda.loader.tensor import SourceTensor
from pagoda.loader.weights import Progress, Transform, load_dummy, load_weights
from pagoda.models import gguf
from pagoda.models.decoder import Decoder, Model
from pagoda.models.hf import HfConfig
from pagoda.models.spec import ModelSpec
from pagoda.quant.scheme import Precision

__all__ = ["FAMILIES", "ModelSource", "build_model", "describe"]

FAMILIES = {
    "Gemma2ForCausalLM": "pagoda.models.gemma2",
    "Gemma3ForCausalLM": "pagoda.models.gemma3",
    "LlamaForCausalLM": "pagoda.models.llama",
    "MistralForCausalLM": "pagoda.models.mistral",
    "Qwen2ForCausalLM": "pagoda.models.qwen2",
    "Qwen3ForCausalLM": "pagoda.models.qwen3",
}


@dataclass(frozen=True)
class ModelSource:
    """A model's description and, for GGUF, its open file; weights are untouched so far."""

    path: Path
    spec: ModelSpec
    names: NameMap
    hf_config: dict[str, Any]
    gguf_file: GgufFile | None = None

    def open_weights(self) -> GgufFile | SafetensorsFile:
        return self.gguf_file or read_safetensors(self.path)


def describe(path: Path, config: ModelConfig) -> ModelSource:
    """Reads headers and config.json only. UnsupportedModel names the nearest architecture we have."""
    gguf_file = read_gguf(path) if path.suffix == ".gguf" else None
    hf = gguf.hf_config(gguf_file) if gguf_file else _read_config(path)
    if config.hf_overrides:
        hf = HfConfig({**hf.values, **_parse_overrides(config.hf_overrides)})
    family = _family(hf.architecture, path)
    make: Callable[[HfConfig], ModelSpec] = family.spec
    try:
        spec = make(hf)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"{path}: config.json cannot be understood: {error!r}") from error
    names = NameMap(gguf_names() if gguf_file else family.NAMES)
    return ModelSource(path, spec, names, hf.values, gguf_file)


def _read_config(path: Path) -> HfConfig:
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError("cannot be read; a model folder needs a config.json", path=file) from error
    except ValueError as error:
        raise ModelFileError(f"is not valid JSON: {error}", path=file) from error
    if not isinstance(values, dict):
        raise ModelFileError("must hold a JSON object", path=file)
    return HfConfig(values)


def _parse_overrides(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"`--hf-overrides` is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("`--hf-overrides` must be a JSON object")
    return values


def _family(architecture: str, path: Path) -> Any:
    if architecture not in FAMILIES:
        known = sorted(FAMILIES)
        raise UnsupportedModel(
            f"{path}: architecture `{architecture}` is not supported{nearest(architecture, known)}; known: {', '.join(known)}"
        )
    return import_module(FAMILIES[architecture])


def build_model(
    source: ModelSource,
    *,
    dtype: str,
    max_positions: int,
    quantization: Literal["int8", "int4"] | None = None,
    activations: Literal["int8", "int16"] = "int16",
    load_format: str = "auto",
    mesh: Mesh | None = None,
    place: Place = HOST,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Model:
    """The model with its weights packed. `dtype` is that of unquantized weights; with `dequantize` there are no others."""
    precision = Precision(dtype, place=place) if dequantize else Precision(dtype, quantization, activations, place)
    model = Decoder(source.spec, precision=precision, max_positions=max_positions, mesh=mesh)
    if load_format == "dummy":
        load_dummy(model.slots(), is_tiled=place is not HOST)
    else:
        files = source.open_weights()
        transform = gguf.row_order(source.gguf_file, source.spec) if source.gguf_file else None
        transform = _dequantized(transform) if dequantize else transform
        load_weights(model.slots(), files, source.names, transform=transform, progress=progress)
    model.finish()
    return model


def _dequantized(transform: Transform | None) -> Transform:
    """`transform`, then block-quantized rows as the floats they stand for."""

    def dense(name: str, tensor: SourceTensor) -> SourceTensor:
        tensor = transform(name, tensor) if transform else tensor
        return tensor if tensor.ggml_type is None else replace(tensor, array=tensor.as_float32(), ggml_type=None)

    return dense
