"""The door of the core: what cannot work is refused here, with numbers; what can becomes n samples.

Later code relies on it: every admitted request fits the context and the pool, and has a seed.
"""

from __future__ import annotations

import hashlib

import msgspec

from pagoda.base.config import EngineConfig
from pagoda.base.errors import InvalidRequest
from pagoda.base.hashing import BlockHash, root_hash
from pagoda.base.types import GenerateRequest, ModelFacts, SamplingParams
from pagoda.engine.kv_manager import KvManager
from pagoda.engine.request import Request

__all__ = ["Admission", "check_prompt_length"]


def check_prompt_length(num_prompt: int, max_model_len: int) -> None:
    """Raises InvalidRequest unless the context has room for the prompt and one more token."""
    if num_prompt >= max_model_len:
        raise InvalidRequest(
            f"this model's maximum context length is {max_model_len} tokens, and the prompt has {num_prompt}; "
            f"shorten it to at most {max_model_len - 1}, so that one token can be generated",
            param="prompt",
            code="context_length_exceeded",
        )


class Admission:
    """Pure but for two counters: requests and samples admitted so far."""

    def __init__(self, config: EngineConfig, facts: ModelFacts, kv: KvManager, max_logits_rows: int) -> None:
        assert isinstance(config.model.max_model_len, int), "the config is not resolved"
        self._config = config
        self._vocab_size = facts.vocab_size
        self._max_model_len = config.model.max_model_len
        self._max_logits_rows = max_logits_rows
        self._kv = kv
        self._num_requests = 0
        self._num_samples = 0

    def validate(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest saying which field is wrong, what it was and what is possible."""
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
        check_prompt_length(len(prompt), self._max_model_len)
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self._vocab_size:
            bad = low if low < 0 else high
            raise InvalidRequest(f"token id {bad} is not in the vocabulary of {self._vocab_size} tokens", param="prompt")
        if request.priority and self._config.scheduler.scheduling_policy != "priority":
            raise InvalidRequest(
                f"`priority` is {request.priority}, but the server runs with --scheduling-policy "
                f"{self._config.scheduler.scheduling_policy}; only `priority` looks at it",
                param="priority",
            )
        self._check_fits(len(prompt), params)

    def _check_fits(self, num_prompt: int, params: SamplingParams) -> None:
        num_tokens = self._num_tokens_max(num_prompt, params)
        needed, usable = self._kv.num_blocks_needed(num_tokens), self._kv.pool.num_blocks - 1
        if needed > usable:
            raise InvalidRequest(
                f"{num_prompt} prompt tokens and up to {num_tokens - num_prompt} more need {needed} KV blocks, and the "
                f"whole cache has {usable}; lower `max_tokens` or shorten the prompt",
                param="max_tokens",
            )
        if not self._config.scheduler.enable_chunked_prefill:
            budget = int(self._config.scheduler.max_num_batched_tokens or 0)
            if params.prompt_logprobs is not None:
                budget = min(budget, self._max_logits_rows)
            if num_prompt > budget:
                raise InvalidRequest(
                    f"without chunked prefill a prompt must fit one step of {budget} tokens, and this one has {num_prompt}",
                    param="prompt",
                )

    def _num_tokens_max(self, num_prompt: int, params: SamplingParams) -> int:
        longest = self._max_model_len
        return longest if params.max_tokens is None else min(longest, num_prompt + params.max_tokens)

    def expand(self, request: GenerateRequest, arrival_time: float) -> list[Request]:
        """The n samples of a valid request. Sample i has seed + i; only the first computes the prompt's logprobs."""
        params = request.params
        seed = params.seed if params.seed is not None else self._draw_seed()
        root = self._hash_root(request)
        samples = [
            Request(
                request_id=request.request_id,
                index=index,
                sequence=self._num_samples + index,
                prompt_token_ids=request.prompt_token_ids,
                params=_params_of_sample(params, seed, index),
                eos_token_ids=request.eos_token_ids,
                max_tokens_total=self._num_tokens_max(len(request.prompt_token_ids), params),
                priority=request.priority,
                hash_root=root,
                arrival_time=arrival_time,
            )
            for index in range(params.n)
        ]
        self._num_requests += 1
        self._num_samples += params.n
        return samples

    def _draw_seed(self) -> int:
        """63 bits from the engine's seed and the number of requests admitted before."""
        text = f"{self._config.model.seed}:{self._num_requests}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def _hash_root(self, request: GenerateRequest) -> BlockHash | None:
        if self._config.cache.enable_prefix_caching:
            return root_hash("salt", request.cache_salt)
        if request.params.n > 1:  # siblings share all the same, and nobody else
            return root_hash("private", str(self._num_requests))
        return None


def _params_of_sample(params: SamplingParams, seed: int, index: int) -> SamplingParams:
    if params.n == 1 and params.seed is not None:
        return params
    wrapped = (seed + index + 2**63) % 2**64 - 2**63
    if wrapped == -1:  # -1 means "no seed" on the wire
        wrapped = 2**63 - 1
    prompt_logprobs = params.prompt_logprobs if index == 0 else None
    return msgspec.structs.replace(params, n=1, seed=wrapped, prompt_logprobs=prompt_logprobs)
