"""The one composition root: from a config to a running core.

    resolve the path -> describe the model -> resolve the config -> load weights -> fit the KV cache -> record -> core

`build_engine` makes what computes, `load_front` what reads and writes text; the API process needs only the second, the
engine process only the first, an offline `LLM` both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import msgspec

from pagoda.base.config import EngineConfig
from pagoda.base.garbage import uncollected
from pagoda.base.hardware import HardwareFacts, read_hardware
from pagoda.base.resolve import KvBudget, Reason, fit_kv_cache, resolve
from pagoda.base.types import ModelFacts
from pagoda.engine.core import EngineCore
from pagoda.executor.front import Front, load_front
from pagoda.executor.parts import BuildModel, RunnerParts
from pagoda.executor.uniproc import UniprocExecutor
from pagoda.files.hub import resolve as resolve_path
from pagoda.kernels import table as kernel_table
from pagoda.kernels.cpu import library
from pagoda.kernels.memory import begin_small
from pagoda.loader.place import HOST, Place
from pagoda.models.catalog import ModelSource, build_model, describe
from pagoda.models.decoder import Model
from pagoda.quant.scheme import not_kept
from pagoda.structured.matcher import GrammarCompiler
from pagoda.worker.batch import BatchBuilder, Sizes
from pagoda.worker.graphs import make_forward
from pagoda.worker.kv_store import KvStore, block_nbytes
from pagoda.worker.logits import load_processors
from pagoda.worker.runner import Runner
from pagoda.worker.table import RequestTable

__all__ = ["Ledger", "LocalEngine", "build_engine", "describe_model"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ledger:
    """Where the memory went, and what fits. Bytes and seconds."""

    architecture: str
    num_parameters: int
    formats: tuple[str, ...]
    weights_nbytes: int
    kv_nbytes: int
    buffers_nbytes: int
    num_blocks: int
    block_size: int
    max_concurrency: float  # requests of max_model_len that fit at once
    max_model_len: int
    mode: str
    mode_why: str
    kernels: str
    load_seconds: float
    device: str = "cpu"
    workspace_nbytes: int = 0  # what the largest step needs for a while, on a GPU
    graphs_nbytes: int = 0
    reasons: tuple[Reason, ...] = field(default=())

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose keys and values fit, in requests of max_model_len."""
        return int(self.max_concurrency * self.max_model_len)

    def lines(self) -> list[str]:
        """The start-up report: choices and their reasons, then the memory ledger."""
        mib = 2**20
        rows = [f"  {r.name:<24}{r.value:<12}{r.why}" for r in self.reasons]
        return [
            f"{self.architecture}, {self.num_parameters / 1e6:.0f} M parameters as {', '.join(self.formats)}; loaded in {self.load_seconds:.2f} s",
            "Chosen automatically:",
            *rows,
            f"  {'kernels':<24}{self.kernels:<12}",
            f"  {'forward':<24}{self.mode:<12}{self.mode_why}",
            "Memory:",
            f"  weights   {self.weights_nbytes / mib:10.1f} MiB",
            f"  KV cache  {self.kv_nbytes / mib:10.1f} MiB   {self.num_kv_tokens:,} tokens, {self.max_concurrency:.1f} requests of {self.max_model_len:,} tokens",
            f"  buffers   {self.buffers_nbytes / mib:10.1f} MiB",
            *([] if self.device == "cpu" else [
                f"  workspace {self.workspace_nbytes / mib:10.1f} MiB   the largest step, logits included",
                f"  graphs    {self.graphs_nbytes / mib:10.1f} MiB",
            ]),
        ]


@dataclass
class LocalEngine:
    """A core and its worker in this process. Text comes in on first use."""

    core: EngineCore
    config: EngineConfig
    facts: ModelFacts
    ledger: Ledger
    source: ModelSource
    executor: UniprocExecutor

    @cached_property
    def front(self) -> Front:
        return load_front(self.config)

    @property
    def tokenizer(self) -> Any:
        return self.front.tokenizer

    @property
    def template(self) -> Any:
        return self.front.template

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.front.generation_config

    def close(self) -> None:
        self.core.close()
        self.executor.stop()


def describe_model(config: EngineConfig) -> tuple[ModelSource, EngineConfig, tuple[Reason, ...], HardwareFacts]:
    """Everything that can be known before weights are read: for `doctor`, and the first half of `build_engine`."""
    m = config.model
    path = resolve_path(m.model, revision=m.revision, token=m.hf_token, download_dir=m.download_dir).path
    source = describe(path, m)
    hardware = _hardware(config)
    resolved = resolve(config, hardware, source.spec.facts())
    return source, resolved.config, resolved.reasons, hardware


def _hardware(config: EngineConfig) -> HardwareFacts:
    """This machine; of a GPU, where one is asked for or its driver is there, what torch says of it."""
    hardware, device = read_hardware(), config.device.device
    if device != "cuda" and not (device == "auto" and hardware.has_cuda):
        return hardware
    try:
        from pagoda.executor.launch_device import with_gpu
    except ImportError as error:
        missing = f"`{error.name}` is not installed, which a GPU needs (`pip install torch triton`)"
        return msgspec.structs.replace(hardware, gpu_problem=missing)
    return with_gpu(hardware)


@uncollected()
def build_engine(config: EngineConfig, *, progress: Progress | None = None, dequantize: bool = False) -> LocalEngine:
    """Loads the model and composes the core. Raises ConfigError, ModelFileError, UnsupportedModel or OutOfMemory.

    With `dequantize` quantized weights become --dtype while loading: what quantization costs is measured against that.
    """
    started = time.perf_counter()
    source, config, reasons, _ = describe_model(config)
    facts = source.spec.facts()
    native = kernel_table.numpy_device() == "cpu"
    if native:
        library.default().set_threads(int(config.device.num_threads or 1))
    wanted = config.model.max_model_len

    def build(place: Place) -> Model:
        return build_model(
            source,
            dtype=config.model.dtype,
            max_positions=facts.max_model_len if wanted == "auto" else int(wanted or 0),
            quantization=config.model.quantization,
            activations="int8" if config.model.linear_activations == "int8" and config.device.device == "cpu" else "int16",
            load_format=config.model.load_format,
            place=place,
            dequantize=dequantize,
            progress=progress,
        )

    if config.device.device == "cpu":
        parts = _build_on_cpu(config, facts, build, native=native)
    else:
        from pagoda.executor.launch_device import build_device_runner  # torch comes with it

        parts = build_device_runner(config, facts, build)
    model, budget, runner = parts.model, parts.budget, parts.runner
    config = replace(config, model=replace(config.model, max_model_len=budget.max_model_len))
    executor = UniprocExecutor(runner)
    compiler = GrammarCompiler(lambda: load_front(config).tokenizer, facts.vocab_size)
    core = EngineCore(
        config, facts, budget.num_blocks, executor, max_logits_rows=runner.max_rows, compiler=compiler,
        pipeline_depth=runner.num_steps, draws_ahead=runner.draws_ahead, overlaps_late=runner.overlaps_late,
    )  # fmt: skip
    mode, why = runner.mode
    ledger = Ledger(
        architecture=facts.architecture, num_parameters=facts.num_parameters, formats=tuple(sorted(model.formats)),
        weights_nbytes=model.nbytes, kv_nbytes=budget.num_blocks * budget.bytes_per_block, buffers_nbytes=parts.buffers_nbytes,
        num_blocks=budget.num_blocks, block_size=budget.block_size, max_concurrency=budget.max_concurrency,
        max_model_len=budget.max_model_len, mode=mode, mode_why=why, kernels=parts.kernels,
        device=config.device.device, workspace_nbytes=parts.workspace_nbytes, graphs_nbytes=parts.graphs_nbytes,
        load_seconds=time.perf_counter() - started, reasons=(*reasons, *parts.reasons, *_dequantized(source, config), budget.reason),
    )  # fmt: skip
    return LocalEngine(core, config, facts, ledger, source, executor)


def _build_on_cpu(config: EngineConfig, facts: ModelFacts, build: BuildModel, *, native: bool) -> RunnerParts:
    model = build(HOST)
    budget = fit_kv_cache(
        config, facts, read_hardware().memory_available,
        block_nbytes(facts, dtype=config.cache.kv_cache_dtype, block_size=int(config.cache.block_size or 0)),
    )  # fmt: skip
    runner, buffers = _build_runner(config, facts, model, budget, native=native)
    return RunnerParts(runner, model, budget, library.default().isa if native else "reference", buffers)


def _dequantized(source: ModelSource, config: EngineConfig) -> tuple[Reason, ...]:
    """Says which block types of a GGUF file did not stay packed."""
    file = source.gguf_file
    types = not_kept(info.dtype for info in file.tensors.values() if len(info.shape) == 2) if file else []
    to = config.model.quantization or config.model.dtype
    return tuple(Reason("dequantized", name, f"no kernel multiplies {name} blocks packed; they became {to} while loading") for name in types)


def _build_runner(
    config: EngineConfig, facts: ModelFacts, model: Model, budget: KvBudget, *, native: bool
) -> tuple[Runner, int]:
    """-> the runner and the bytes of its buffers."""
    scheduler = config.scheduler
    tokens, seqs = int(scheduler.max_num_batched_tokens or 0), int(scheduler.max_num_seqs or 0)
    blocks = -(-budget.max_model_len // budget.block_size)
    sizes = Sizes(max_tokens=tokens, max_seqs=min(seqs, tokens), max_rows=min(tokens, max(seqs, 64)), max_blocks=blocks)
    store = KvStore(facts, dtype=config.cache.kv_cache_dtype, block_size=budget.block_size, num_blocks=budget.num_blocks)
    begin_small([side for plane in store.planes for side in (plane.k, plane.v)])
    builder = BatchBuilder(sizes, len(facts.kv_groups), budget.block_size)
    table = RequestTable(
        max_num_seqs=seqs, max_model_len=budget.max_model_len, num_groups=len(facts.kv_groups), max_blocks=blocks,
        processors=load_processors(config.model.logits_processors),
    )  # fmt: skip
    depth = 2 if config.device.async_scheduling else 1
    forward = make_forward(model, builder, store, eager=config.device.enforce_eager, native=native, num_steps=depth)
    return Runner(table, builder, forward, store), builder.nbytes + table.nbytes + forward.nbytes
