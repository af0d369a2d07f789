"""`--record-arrivals FILE`: what a bug report needs to run a workload again. It holds the prompts' token ids: mind who gets it.

JSON lines. The first says what was served: {"pagoda": version, "config": {flag: value, ...}}. Then two per prompt, matched by `id`:

    {"id", "at": seconds since the first line, "prompt_token_ids", "fields": {...}}    when it arrives
    {"id", "output_tokens", "finish_reason"}                                           when it ends

`fields` is what a body of /v1/completions says about sampling. `pagoda bench serve --dataset-name recorded --dataset-path FILE`
sends the same prompts at the same times, and lets each answer have its recorded length.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pagoda import __version__
from pagoda.base.errors import ConfigError
from pagoda.base.types import SamplingParams

__all__ = ["ArrivalRecorder", "body_fields"]

_FIELDS = (
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
    "stop_token_ids", "bad_words", "include_stop_str_in_output", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs",
    "skip_special_tokens", "allowed_token_ids", "typical_p", "top_n_sigma", "dynatemp_range", "dynatemp_exponent", "xtc_probability",
    "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_range", "dry_sequence_breakers", "mirostat_mode",
    "mirostat_tau", "mirostat_eta", "banned_strings", "use_beam_search", "length_penalty", "timeout",
)  # fmt: skip
_DEFAULT = SamplingParams()


def body_fields(params: SamplingParams) -> dict[str, Any]:
    """Fields of a completion's body that mean `params`; `max_tokens` always, the others where they are not the default."""
    found = {name: getattr(params, name) for name in _FIELDS if getattr(params, name) != getattr(_DEFAULT, name)}
    if params.logit_bias:
        found["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias.items()}
    if params.structured_outputs is not None:
        wanted = msgspec.to_builtins(params.structured_outputs)
        found["structured_outputs"] = {key: value for key, value in wanted.items() if key not in ("starts_after", "opens_with")}
    if params.extra_args:
        found["vllm_xargs"] = params.extra_args
    return {**found, "max_tokens": params.max_tokens}


class ArrivalRecorder:
    """Thread-safe. Every line is on disk when the call returns, so that a crash loses none. Raises ConfigError."""

    def __init__(self, path: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        try:
            self._file = Path(path).expanduser().open("wb", buffering=0)
        except OSError as error:
            raise ConfigError(f"`--record-arrivals {path}` cannot be written: {error.strerror or error}") from None
        self._start = clock()

    def begin(self, config: dict[str, Any]) -> None:
        """The model is loaded: `config` are the flags that were given."""
        self._write({"pagoda": __version__, "config": config})

    def arrived(self, name: str, prompt_token_ids: list[int], params: SamplingParams, more: dict[str, Any]) -> None:
        fields = {**body_fields(params), **more}
        self._write({"id": name, "at": round(self._clock() - self._start, 6), "prompt_token_ids": prompt_token_ids, "fields": fields})

    def ended(self, name: str, num_tokens: int, finish_reason: str | None) -> None:
        """`finish_reason` None: nobody waited for the end, or there was an error."""
        self._write({"id": name, "output_tokens": num_tokens, "finish_reason": finish_reason})

    def _write(self, row: dict[str, Any]) -> None:
        line = msgspec.json.encode(row) + b"\n"
        with self._lock:
            if not self._file.closed:
                self._file.write(line)

    def close(self) -> None:
        with self._lock:
            self._file.close()
