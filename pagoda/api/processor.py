"""From what a caller says to what the core computes: prompt and parameters become one GenerateRequest.

Defaults, in order: what the caller set, the model's generation_config (for callers that bring no parameters), vLLM's.
Everything that depends on the vocabulary or on the context's length is checked here, before the core sees the request.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import msgspec

from pagoda.base.config import EngineConfig
from pagoda.base.errors import InvalidRequest
from pagoda.base.registry import nearest
from pagoda.base.types import GenerateRequest, ModelFacts, SamplingParams, StructuredOutputsParams
from pagoda.engine.admission import check_prompt_length
from pagoda.structured.banned import banned_grammar
from pagoda.structured.translate import both, translate
from pagoda.text.tokenizer import Tokenizer

__all__ = ["Processed", "Processor", "Prompt", "PromptDict", "is_slow", "sampling_defaults"]


class PromptDict(TypedDict, total=False):
    """Text, token ids, or both: then the ids are computed and the text is only reported back."""

    prompt: str | None
    prompt_token_ids: list[int] | None
    cache_salt: str | None


Prompt = str | Sequence[int] | PromptDict

_PROMPT_KEYS = ["prompt", "prompt_token_ids", "cache_salt"]
_BREAKERS = ("\n", ":", '"', "*")  # of DRY, where the request names none
_COPIED_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Processed(NamedTuple):
    request: GenerateRequest
    prompt: str | None  # the text, where there was one


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams that a model's generation_config sets; `max_new_tokens` is `max_tokens` here."""
    found = {name: generation_config[name] for name in _COPIED_DEFAULTS if generation_config.get(name) is not None}
    if generation_config.get("max_new_tokens") is not None:
        found["max_tokens"] = generation_config["max_new_tokens"]
    return found


class Processor:
    """Thread-safe: it only reads. `config` is resolved."""

    def __init__(
        self,
        config: EngineConfig,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        *,
        generation_config: Mapping[str, Any] | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        assert isinstance(config.model.max_model_len, int), "the config is not resolved"
        generation_config = generation_config or {}
        self.tokenizer = tokenizer
        self.max_model_len = config.model.max_model_len
        self.default_values = sampling_defaults(generation_config)
        self._max_logprobs = config.model.max_logprobs
        self._logprobs_mode = config.model.logprobs_mode
        self._breaker_ids = functools.lru_cache(maxsize=16)(self._find_breakers)
        self._vocab_size = facts.vocab_size
        self.eos_token_ids = _eos_ids(eos_token_ids, generation_config)

    def default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults with the model's own on top."""
        return SamplingParams(**self.default_values)

    def process(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str = "",
        arrival_time: float = 0.0,
    ) -> Processed:
        """Raises InvalidRequest, with `param` naming what is wrong. `params` is not changed."""
        params = self.default_sampling_params() if params is None else params
        text, token_ids, salt = self._read(prompt)
        token_ids = self._truncate(token_ids, params)
        check_prompt_length(len(token_ids), self.max_model_len)
        self._check(params)
        wanted = params.structured_outputs
        request = GenerateRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=self._complete(params, len(token_ids)),
            eos_token_ids=self.eos_token_ids,
            priority=priority,
            cache_salt=salt or cache_salt,
            arrival_time=arrival_time,
            grammar=_grammar(params),
            grammar_starts_after=[] if wanted is None else wanted.starts_after,
            grammar_opens_with=None if wanted is None else wanted.opens_with,
        )
        return Processed(request, text)

    # ---- the prompt

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int], str]:
        """Text, ids and salt of the four shapes of a prompt."""
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt), ""
        if isinstance(prompt, Mapping):
            return self._read_dict(prompt)
        if not isinstance(prompt, Sequence) or not all(type(token_id) is int for token_id in prompt):
            raise InvalidRequest("a prompt is a string, a list of token ids, or a dict with one of them", param="prompt")
        return None, [int(token_id) for token_id in prompt], ""

    def _read_dict(self, prompt: Mapping[str, Any]) -> tuple[str | None, list[int], str]:
        for key in prompt:
            if key not in _PROMPT_KEYS:
                raise InvalidRequest(f"unknown key `{key}` in the prompt{nearest(key, _PROMPT_KEYS)}", param="prompt")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        salt = prompt.get("cache_salt") or ""
        if ids is None and not isinstance(text, str):
            raise InvalidRequest("a prompt dict needs `prompt` (a string) or `prompt_token_ids` (a list)", param="prompt")
        inner: str | Sequence[int] = text if ids is None else ids  # type: ignore[assignment]
        return text, self._read(inner)[1], salt

    def _truncate(self, token_ids: list[int], params: SamplingParams) -> list[int]:
        """Keeps the end, or the beginning where `truncation_side` is right. -1 keeps what leaves room for `max_tokens`, or for one token where that is not set."""
        keep = params.truncate_prompt_tokens
        if keep is None:
            return token_ids
        if keep > self.max_model_len:
            raise InvalidRequest(
                f"`truncate_prompt_tokens` is {keep}, but the context is {self.max_model_len} tokens long", param="truncate_prompt_tokens"
            )
        if keep == -1:
            keep = max(1, self.max_model_len - (params.max_tokens or 1))
        return token_ids[-keep:] if params.truncation_side == "left" else token_ids[:keep]

    # ---- the parameters

    def _check(self, params: SamplingParams) -> None:
        """What SamplingParams cannot know by itself."""
        limit = self._vocab_size if self._max_logprobs == -1 else self._max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            wanted = self._vocab_size if asked == -1 else asked
            if wanted is not None and wanted > limit:
                raise InvalidRequest(f"`{name}` is {asked}, but at most {limit} are given (--max-logprobs)", param=name)
        if params.thinking_token_budget is not None and params.thinking is None:
            raise InvalidRequest("`thinking_token_budget` needs a chat with a model whose reasoning has marks (--reasoning-parser)", param="thinking_token_budget")
        if params.use_beam_search and 2 * params.n > limit:
            raise InvalidRequest(f"{params.n} beams need {2 * params.n} logprobs, but at most {limit} are given (--max-logprobs)", param="n")
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids"):
            for token_id in getattr(params, name) or ():
                if not 0 <= token_id < self._vocab_size:
                    raise InvalidRequest(
                        f"`{name}` has token id {token_id}, which is not in the vocabulary of {self._vocab_size} tokens", param=name
                    )

    def _complete(self, params: SamplingParams, num_prompt: int) -> SamplingParams:
        """The parameters as the core wants them; the caller's object when nothing was missing."""
        changes: dict[str, Any] = {}
        room = self.max_model_len - num_prompt
        if params.max_tokens is None:
            changes["max_tokens"] = max(room, params.min_tokens)
        if params.structured_outputs is not None or params.banned_strings:  # the worker sees masks only
            changes |= {"structured_outputs": None, "banned_strings": None}
        if params.logprobs_mode is None and self._logprobs_mode != "raw_logprobs":
            changes["logprobs_mode"] = self._logprobs_mode
        if params.dry_multiplier > 0:
            breakers = _BREAKERS if params.dry_sequence_breakers is None else tuple(params.dry_sequence_breakers)
            changes["dry_breaker_ids"] = self._breaker_ids(breakers)
        if params.bad_words:
            changes["bad_words_token_ids"] = [*(params.bad_words_token_ids or ()), *self._spellings(params.bad_words)]
        return msgspec.structs.replace(params, **changes) if changes else params

    def _spellings(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of each word at the start of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip(" ")
            spelled = [self.tokenizer.encode(prefix + bare, add_special_tokens=False) for prefix in ("", " ")] if bare else []
            if not any(spelled):
                raise InvalidRequest(f"`bad_words` has {word!r}, which has no tokens", param="bad_words")
            found.update((tuple(ids), None) for ids in spelled if ids)
        return [list(ids) for ids in found]


    def _find_breakers(self, breakers: tuple[str, ...]) -> list[int]:
        """Tokens whose text has a breaker in it; a breaker that no single token has counts by its last token."""
        texts = [self.tokenizer.token_str(i) for i in range(min(self._vocab_size, self.tokenizer.vocab_size))]
        found: set[int] = set()
        for breaker in breakers:
            ids = [i for i, text in enumerate(texts) if breaker in text]
            found.update(ids or self.tokenizer.encode(breaker, add_special_tokens=False)[-1:])
        return sorted(found)


def is_slow(params: SamplingParams | None) -> bool:
    """Whether `process` may take too long for an event loop: it reads the whole vocabulary, or makes a grammar."""
    return params is not None and (params.dry_multiplier > 0 or bool(params.banned_strings))


def _grammar(params: SamplingParams) -> str | None:
    """What the text must look like; banned strings are such a demand, beside a structure or alone."""
    wanted = [] if params.structured_outputs is None else [params.structured_outputs]
    if params.banned_strings:
        wanted.append(StructuredOutputsParams(grammar=banned_grammar(params.banned_strings)))
    return both([translate(each).grammar for each in wanted]) if wanted else None


def _eos_ids(eos_token_ids: Sequence[int], generation_config: Mapping[str, Any]) -> list[int]:
    more = generation_config.get("eos_token_id")
    more = [] if more is None else [more] if isinstance(more, int) else list(more)
    return list(dict.fromkeys([*eos_token_ids, *more]))
