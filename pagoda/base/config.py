"""What a user may set: one frozen dataclass per owner; a default is written here and nowhere else.

CLI flags are generated from these fields (`--field-name`, or `flag=` in the metadata); where vLLM has a flag of the same
meaning, ours has the same name. `None` means "chosen automatically": `resolve()` fills it in and says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pagoda.base.errors import ConfigError
from pagoda.base.registry import nearest

__all__ = [
    "CacheConfig",
    "DeviceConfig",
    "EngineConfig",
    "ModelConfig",
    "SchedulerConfig",
    "ServerConfig",
    "changed_fields",
    "config_from_kwargs",
    "field",
]


def field(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a flag. Metadata: `short` ("-q"), `choices`, `metavar`, `repeat` (list flag)."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how its files are read."""

    model: str | None = field(None, "Hugging Face id or folder, or a .gguf file; without it the default model (SmolLM2-135M-Instruct) is served")
    served_model_name: Sequence[str] = field((), "names the API answers to; the first is reported back", repeat=True)
    tokenizer: str | None = field(None, "folder or id of the tokenizer, if it is not the model's")
    revision: str | None = field(None, "branch, tag or commit on the hub")
    hf_token: str | None = field(None, "token for gated hub repositories (default: HF_TOKEN)")
    download_dir: str | None = field(None, "where the hub's files are cached (default: the hub's own cache)")
    load_format: Literal["auto", "dummy"] = field("auto", "auto reads the files; dummy makes random weights of the model's shape")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field("auto", "type of unquantized weights; auto follows the checkpoint (float16, on GPUs only, and GGUF types: see docs)")
    quantization: Literal["int8", "int4"] | None = field(None, "turn weights into 8 or 4 bits while loading (default: as the checkpoint has them)")
    linear_activations: Literal["auto", "int8", "int16"] = field("auto", "what quantized weights are multiplied with: int8 is twice as fast on many tokens, int16 (auto) is as good as float")
    max_model_len: int | Literal["auto"] | None = field(None, "longest prompt + output in tokens; auto fits it to memory", metavar="TOKENS|auto")
    seed: int = field(0, "origin of the seeds given to requests that bring none")
    max_logprobs: int = field(20, "most logprobs a request may ask for; -1: the whole vocabulary")
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"] = field("raw_logprobs", "what logprobs are: log-probabilities or logits, as the model made them or as they were drawn from")
    logits_processors: Sequence[str] = field((), "classes that change logits, as package.module:Class", repeat=True, metavar="CLASS")
    generation_config: str = field("auto", "auto: sampling defaults from the model's generation_config.json; vllm: ignore it; or a folder")
    override_generation_config: str | None = field(None, "JSON with sampling defaults that win over the model's", metavar="JSON")
    hf_overrides: str | None = field(None, "JSON merged into the model's config", metavar="JSON")
    chat_template: str | None = field(None, "chat template file, or the template itself")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int | None = field(None, "tokens per KV block (CPU: a multiple of 16)", metavar="TOKENS")
    enable_prefix_caching: bool = field(True, "keep full blocks of past prompts and reuse them")
    kv_cache_memory_bytes: int | None = field(None, "size of the KV cache; 1g, 1G, 512m are understood", metavar="BYTES")
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"] = field("auto", "type of cached keys and values; auto is bfloat16 unless --dtype is float32 (on a GPU --dtype); int8 on a CPU and fp8 on a GPU hold nearly twice the tokens")
    cpu_memory_utilization: float = field(0.4, "share of the memory available at start that the KV cache may take on a CPU")
    gpu_memory_utilization: float = field(0.92, "share of the device's memory for weights, buffers and KV cache on a GPU")
    num_gpu_blocks_override: int | None = field(None, "exact number of KV blocks, for experiments with preemption")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What runs in a step."""

    max_num_seqs: int | None = field(None, "most requests running at once")
    max_num_batched_tokens: int | None = field(None, "most tokens computed in one step")
    scheduling_policy: Literal["fcfs", "priority"] = field("fcfs", "first come first served, or the request's `priority` (lower is sooner)")
    enable_chunked_prefill: bool = field(True, "let a long prompt span steps, so that others go on decoding")
    long_prefill_token_threshold: int = field(0, "most prompt tokens of one request in a step while others wait; 0: no limit")
    itl_target_ms: float | None = field(
        None,
        "time between tokens that prompts computed beside running streams may cause; 0: prompts take whole steps; "
        "without it a step's prompts take about as long as its decoding",
        metavar="MS",
    )
    max_num_queued_reqs: int | None = field(None, "requests that may wait before new ones get 429; -1: no limit (default: 4096 for a server, no limit offline)")
    watermark: float = field(0.0, "share of KV blocks kept free when admitting, against preemption")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where the arithmetic happens."""

    device: Literal["auto", "cpu", "cuda", "null"] = field("auto", "auto takes a GPU if there is a usable one; null is the GPU's path in Triton's interpreter, for tests")
    num_threads: int | None = field(None, "kernel threads on a CPU (default: cores given by affinity and cgroup quota)")
    enforce_eager: bool = field(False, "run op by op instead of as one recorded program or graph")
    async_scheduling: bool = field(True, "plan and start a step while the one before it runs")
    graph_capture_seconds: float = field(20.0, "on a GPU, seconds at start for capturing graphs of decoding; batch sizes that are not reached take the next larger", metavar="SECONDS")
    batch_invariant: bool = field(False, "on a GPU, compute every row with the same tiles whatever its neighbours are (a CPU always does)")
    attention_backend: Literal["auto", "triton", "sdpa"] = field("auto", "on a GPU, what computes attention; auto takes the first that can")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP front."""

    host: str = field("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    port: int = field(8000, "TCP port")
    api_server_count: int = field(1, "processes that speak HTTP, on one port and with one engine; more than 1 where the front takes a whole core", metavar="N")
    uds: str | None = field(None, "path of a Unix domain socket to listen on instead")
    root_path: str = field("", "path prefix when served behind a proxy")
    api_key: Sequence[str] = field((), "key clients must send as `Authorization: Bearer KEY`; several allowed (or PAGODA_API_KEY)", repeat=True)
    api_key_file: str | None = field(None, "file with more keys, one a line", metavar="FILE")
    allowed_origins: Sequence[str] = field((), "origins whose pages may call this server (CORS); *: all. None without it", repeat=True, metavar="ORIGIN")
    allow_credentials: bool = field(False, "let those pages send cookies and Authorization")
    allowed_methods: Sequence[str] = field(("*",), "methods those pages may use", repeat=True, metavar="METHOD")
    allowed_headers: Sequence[str] = field(("*",), "headers those pages may send", repeat=True, metavar="HEADER")
    ssl_keyfile: str | None = field(None, "private key: serve HTTPS", metavar="FILE")
    ssl_certfile: str | None = field(None, "certificate (chain) of that key", metavar="FILE")
    ssl_ca_certs: str | None = field(None, "certificates that clients' certificates are checked against", metavar="FILE")
    ssl_cert_reqs: Literal["none", "optional", "required"] = field("none", "whether clients must show a certificate")
    request_timeout: float | None = field(None, "most seconds a request may take, and what it may take if it says no `timeout`", metavar="SECONDS")
    sse_keep_alive_interval: float = field(15.0, "seconds of silence after which a stream gets a comment; 0: never", metavar="SECONDS")
    stream_stall_timeout: float = field(60.0, "seconds a stream may wait for its reader before its request ends; 0: for ever", metavar="SECONDS")
    stream_buffer_bytes: int = field(4 << 20, "about how much of a stream may wait for its reader before its request ends; 0: no bound", metavar="BYTES")
    strict_fields: bool = field(False, "answer 400 to fields nobody knows, instead of a warning header")
    enable_tokenizer_info_endpoint: bool = field(False, "serve GET /tokenizer_info: tokenizer_config.json with the chat template")
    trust_request_chat_template: bool = field(False, "let requests bring a `chat_template` of their own")
    default_chat_template_kwargs: str | None = field(None, "JSON with arguments of the chat template where a request gives none", metavar="JSON")
    enable_force_include_usage: bool = field(False, "let every stream end with its usage")
    return_tokens_as_token_ids: bool = field(False, "name tokens in logprobs as token_id:N where a request does not say")
    enable_per_request_metrics: bool = field(False, "put each request's timings in its answer as `metrics`")
    record_arrivals: str | None = field(None, "file that gets a line per request, for `bench serve --dataset-name recorded`", metavar="FILE")
    response_role: str = field("assistant", "role of chat answers")
    enable_auto_tool_choice: bool = field(True, "look for tool calls in answers when a request brings tools")
    tool_call_parser: str = field("auto", "how the model writes tool calls; auto reads it off the chat template, none looks for none", metavar="NAME")
    reasoning_parser: str = field("auto", "how the model marks its reasoning; auto reads it off the chat template, none leaves it in the content", metavar="NAME")
    shutdown_timeout: float = field(30.0, "seconds SIGTERM waits for running requests", metavar="SECONDS")
    max_request_body_bytes: int = field(32 << 20, "larger request bodies are answered with 413", metavar="BYTES")
    disable_log_stats: bool = field(False, "no line of figures every 10 seconds")
    enable_log_requests: bool = field(False, "log each request's id and parameters")
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug"] = field("warning", "log level of the HTTP server")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything below the front. As given by the user, fields may be None; after `resolve()` none of them is."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    device: DeviceConfig = DeviceConfig()


def changed_fields(config: EngineConfig) -> dict[str, Any]:
    """What differs from the defaults, by field name, as a `--config` file holds it."""
    found: dict[str, Any] = {}
    for owner in dataclasses.fields(config):
        part = getattr(config, owner.name)
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            if value != item.default:
                found[item.name] = list(value) if isinstance(value, tuple) else value
    return found


_OWNERS = {"model": ModelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig, "device": DeviceConfig}


def config_from_kwargs(model: str | None = None, **kwargs: Any) -> EngineConfig:
    """`LLM(model, max_model_len=..., block_size=...)`: each name goes to its owner; unknown names are errors."""
    kwargs["model"] = model
    parts: dict[str, dict[str, Any]] = {owner: {} for owner in _OWNERS}
    homes = {f.name: owner for owner, cls in _OWNERS.items() for f in dataclasses.fields(cls)}
    for name, value in kwargs.items():
        if name not in homes:
            raise ConfigError(f"unknown argument `{name}`{nearest(name, sorted(homes))}")
        parts[homes[name]][name] = value
    return EngineConfig(**{owner: cls(**parts[owner]) for owner, cls in _OWNERS.items()})
