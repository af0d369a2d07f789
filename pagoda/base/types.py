"""The nouns that cross rooms: what is asked, what is answered, and what a model tells the brain about itself.

Wire formats (HTTP bodies, offline arguments) end at adapters; inside there is one request type and one event type.
Everything here is a msgspec struct, so it is also its own wire format between processes.
"""

from __future__ import annotations

import enum
import math
from typing import Any, Literal

import msgspec

from pagoda.base.errors import InvalidRequest

__all__ = [
    "CompletionOutput",
    "DrawsAhead",
    "EngineOutput",
    "FinishReason",
    "GenerateRequest",
    "KvGroup",
    "Logprob",
    "LogprobsMode",
    "ModelFacts",
    "RepetitionDetection",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "Thinking",
    "TokenLogprobs",
]

MAX_SAMPLES = 16384
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_BANNED_STRINGS = 256
MAX_BREAKERS = 64
MAX_LOGPROB_TOKEN_IDS = 128
MAX_DEVICE_LOGPROBS = 128  # a request for more is drawn on the host
MAX_PATTERN = 1024  # tokens of a repeated pattern

LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]
"""What `logprobs` are: log-probabilities or logits, as the model made them or as they were drawn from."""


class FinishReason(enum.StrEnum):
    STOP = "stop"  # eos, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    REPETITION = "repetition"  # `repetition_detection` found one
    ABORT = "abort"  # the client went away or asked for it
    ERROR = "error"  # this request failed; `error` says why


class RequestOutputKind(enum.IntEnum):
    CUMULATIVE = 0  # every output carries everything so far
    DELTA = 1  # every output carries what is new
    FINAL_ONLY = 2  # one output, at the end


class StructuredOutputsParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the text must look like: exactly one of the first six. Names are vLLM's. Raises InvalidRequest."""

    json: str | dict[str, Any] | bool | None = None  # a JSON schema, or its text
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark, or GBNF/EBNF with a `root` rule
    json_object: bool | None = None  # any JSON object
    structural_tag: str | dict[str, Any] | None = None  # free text, and structure between tags
    disable_any_whitespace: bool = False  # JSON without spaces and newlines between its parts
    disable_additional_properties: bool = False  # objects without `additionalProperties` allow none
    whitespace_pattern: str | None = None  # regex of what may stand between the parts of JSON
    starts_after: list[int] = []  # the structure begins behind these tokens (the end of reasoning); empty: at once
    opens_with: int | None = None  # with `starts_after`: only if the output's first token is this one, else at once

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [name for name in kinds if getattr(self, name) not in (None, False) or (name == "json" and self.json is False)]
        if len(given) != 1:
            raise InvalidRequest(
                f"`structured_outputs` needs exactly one of {', '.join(kinds)}; it has {', '.join(given) or 'none'}",
                param="structured_outputs",
            )


class RepetitionDetection(msgspec.Struct, kw_only=True):
    """End a sample whose last tokens are `min_count` times the same pattern. Names are vLLM's. Raises InvalidRequest."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int

    def __post_init__(self) -> None:
        self.min_pattern_size = max(1, self.min_pattern_size)
        where = "repetition_detection"
        _check(1 <= self.max_pattern_size <= MAX_PATTERN, f"{where}.max_pattern_size", f"must be between 1 and {MAX_PATTERN}", self.max_pattern_size)
        _check(self.min_pattern_size <= self.max_pattern_size, f"{where}.min_pattern_size", "must be at most max_pattern_size", self.min_pattern_size)
        _check(self.min_count >= 2, f"{where}.min_count", "must be at least 2", self.min_count)

    def finds(self, token_ids: list[int], begin: int) -> bool:
        """Whether `token_ids` end in such a repetition that lies behind `begin`."""
        last = len(token_ids)
        for size in range(self.min_pattern_size, self.max_pattern_size + 1):
            length = size * self.min_count
            if length > last - begin:
                return False
            if token_ids[-1] == token_ids[-1 - size] and token_ids[last - length + size :] == token_ids[last - length : last - size]:
                return True
        return False


class Thinking(msgspec.Struct, frozen=True):
    """The tokens that reasoning stands between; `is_open`: the prompt ends with its start."""

    start: list[int]
    end: list[int]
    is_open: bool


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How to choose tokens and when to stop. Names and defaults are vLLM's.

    Raises InvalidRequest naming the field on a bad value. The order in which the values act on the logits is documented
    and implemented once, in `worker/sampler.py`.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the end of the context
    min_tokens: int = 0
    logprobs: int | None = None  # -1: the whole vocabulary
    logprob_token_ids: list[int] | None = None  # with `logprobs`: of these tokens instead of the most likely
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None  # keep the last that many; -1: as many as fit the context
    truncation_side: Literal["left", "right"] = "left"  # which end of the prompt is cut off
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words_token_ids: list[list[int]] | None = None  # filled by the front from `bad_words`
    structured_outputs: StructuredOutputsParams | None = None  # the front turns it into `GenerateRequest.grammar`
    typical_p: float = 1.0
    top_n_sigma: float = 0.0  # 0 or -1: off
    dynatemp_range: float = 0.0  # temperature moves this far both ways with the entropy; 0: off
    dynatemp_exponent: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0  # of how many last tokens; 0 or -1: all
    dry_sequence_breakers: list[str] | None = None  # None: newline, colon, quotation mark, asterisk
    dry_breaker_ids: list[int] | None = None  # filled by the front from `dry_sequence_breakers`
    mirostat_mode: int = 0  # 0: off, 2: the second algorithm
    mirostat_tau: float = 5.0  # bits of surprise per token
    mirostat_eta: float = 0.1
    banned_strings: list[str] | None = None  # the front turns it into `GenerateRequest.grammar`
    use_beam_search: bool = False  # `n` beams; the front runs them
    length_penalty: float = 1.0  # of beam search: a beam's score is its log-probability / length ** penalty
    logprobs_mode: LogprobsMode | None = None  # None: the engine's
    repetition_detection: RepetitionDetection | None = None
    thinking_token_budget: int | None = None  # tokens of reasoning, then its end is forced; None or -1: no limit
    thinking: Thinking | None = None  # filled by the front where there is a budget
    timeout: float | None = None  # seconds from arrival, kept by AsyncEngine: then the answer ends as it is
    extra_args: dict[str, Any] | None = None  # for logits processors of plug-ins

    @property
    def is_drawn_on_device(self) -> bool:
        """A GPU does by itself whatever is between the logits and the token, and reports what is asked of it (`worker/device_steps.py`):
        nothing of the draw needs the host, so the next token can be planned before this one is known."""
        return (
            all(getattr(self, name) == value for name, value in _OFF_VALUES)
            and (self.logprobs is None or 0 <= self.logprobs <= MAX_DEVICE_LOGPROBS)
            and not (self.logprobs_mode or "").startswith("processed_")
            and all(len(word) == 1 for word in self.bad_words_token_ids or ())
        )

    @property
    def is_drawn_by_forward(self) -> bool:
        """The draw at the end of a CPU's forward makes the token: its logits are neither changed nor reported (`worker/runner.py`)."""
        return (
            self.is_drawn_on_device
            and self.logprobs is None
            and self.min_tokens == 0
            and self.allowed_token_ids is None
            and not (self.bad_words_token_ids or self.logit_bias or self.presence_penalty or self.frequency_penalty)
            and self.repetition_penalty == 1.0
        )

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = self.stop or []
        self.stop_token_ids = self.stop_token_ids or []
        self.bad_words = self.bad_words or []
        self._check_numbers()
        self._check_lists()
        self._check_chain()

    def _check_numbers(self) -> None:
        _check(1 <= self.n <= MAX_SAMPLES, "n", f"must be between 1 and {MAX_SAMPLES}", self.n)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(-2.0 <= value <= 2.0, name, "must be between -2 and 2", value)
        _check(0.01 <= self.repetition_penalty <= 2.0, "repetition_penalty", "must be at least 0.01 and at most 2", self.repetition_penalty)
        _check(0.0 <= self.temperature <= 2.0, "temperature", "must be between 0 and 2", self.temperature)
        if 0.0 < self.temperature < 0.01:  # below it logits / temperature leaves the range of float32
            self.temperature = 0.01
        _check(0.0 < self.top_p <= 1.0, "top_p", "must be above 0 and at most 1", self.top_p)
        _check(self.top_k >= -1, "top_k", "must be -1 or 0 (all), or at least 1", self.top_k)
        self.top_k = min(self.top_k, 2**31 - 1)  # more than any vocabulary, and it fits the worker's tables
        _check(0.0 <= self.min_p <= 1.0, "min_p", "must be between 0 and 1", self.min_p)
        if self.seed == -1:
            self.seed = None
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits", self.seed)
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be at least 1", self.max_tokens)
        _check(self.min_tokens >= 0, "min_tokens", "must not be negative", self.min_tokens)
        if self.max_tokens is not None:
            _check(self.min_tokens <= self.max_tokens, "min_tokens", f"must be at most max_tokens={self.max_tokens}", self.min_tokens)
        _check(self.logprobs is None or self.logprobs >= -1, "logprobs", "must be -1 (all) or at least 0", self.logprobs)
        _check(self.prompt_logprobs is None or self.prompt_logprobs >= -1, "prompt_logprobs", "must be -1 (all) or at least 0", self.prompt_logprobs)
        keep = self.truncate_prompt_tokens
        _check(keep is None or keep == -1 or keep >= 1, "truncate_prompt_tokens", "must be -1 or at least 1", keep)
        _check(self.n == 1 or self.temperature > 0.0 or self.use_beam_search, "n", "must be 1 with temperature 0: all samples would be equal", self.n)

    def _check_lists(self) -> None:
        _check(all(isinstance(s, str) and s for s in self.stop or ()), "stop", "must not contain an empty string", self.stop)
        _check(len(self.stop or ()) <= MAX_STOP_STRINGS, "stop", f"must have at most {MAX_STOP_STRINGS} strings", len(self.stop or ()))
        _check(not self.stop or self.detokenize, "stop", "needs detokenize=True", self.stop)
        _check(all(i >= 0 for i in self.stop_token_ids or ()), "stop_token_ids", "must not be negative", self.stop_token_ids)
        _check(all(self.bad_words or ()), "bad_words", "must not contain an empty string", self.bad_words)
        _check(self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "allowed_token_ids", "must not be empty", self.allowed_token_ids)
        if self.logit_bias:
            _check(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"must have at most {MAX_LOGIT_BIAS} entries", len(self.logit_bias))
            self.logit_bias = {int(k): min(100.0, max(-100.0, float(v))) for k, v in self.logit_bias.items()}
        wanted = self.logprob_token_ids
        _check(wanted is None or 1 <= len(wanted) <= MAX_LOGPROB_TOKEN_IDS, "logprob_token_ids", f"must have 1 to {MAX_LOGPROB_TOKEN_IDS} entries", len(wanted or ()))
        _check(wanted is None or self.logprobs is not None, "logprob_token_ids", "needs `logprobs`", wanted)
        for name, limit in (("banned_strings", MAX_BANNED_STRINGS), ("dry_sequence_breakers", MAX_BREAKERS)):
            texts = getattr(self, name) or ()
            _check(len(texts) <= limit, name, f"must have at most {limit} entries", len(texts))
            _check(all(texts), name, "must not contain an empty string", texts)

    def _check_chain(self) -> None:
        """The parts of the chain that are off by default."""
        _check(0.0 < self.typical_p <= 1.0, "typical_p", "must be above 0 and at most 1", self.typical_p)
        if self.top_n_sigma == -1:
            self.top_n_sigma = 0.0
        _check(0.0 <= self.top_n_sigma <= 1000.0, "top_n_sigma", "must be 0 (off) or positive, at most 1000", self.top_n_sigma)
        _check(0.0 <= self.dynatemp_range <= 2.0, "dynatemp_range", "must be between 0 and 2", self.dynatemp_range)
        _check(0.0 < self.dynatemp_exponent <= 100.0, "dynatemp_exponent", "must be above 0 and at most 100", self.dynatemp_exponent)
        _check(0.0 <= self.xtc_probability <= 1.0, "xtc_probability", "must be between 0 and 1", self.xtc_probability)
        _check(0.0 <= self.xtc_threshold <= 1.0, "xtc_threshold", "must be between 0 and 1", self.xtc_threshold)
        _check(0.0 <= self.dry_multiplier <= 100.0, "dry_multiplier", "must be between 0 and 100", self.dry_multiplier)
        _check(1.0 <= self.dry_base <= 100.0, "dry_base", "must be between 1 and 100", self.dry_base)
        _check(0 <= self.dry_allowed_length < 2**31, "dry_allowed_length", "must not be negative", self.dry_allowed_length)
        _check(-1 <= self.dry_range < 2**31, "dry_range", "must be -1 or 0 (all), or at least 1", self.dry_range)
        _check(self.mirostat_mode in (0, 2), "mirostat_mode", "must be 0 (off) or 2", self.mirostat_mode)
        _check(0.0 <= self.mirostat_tau <= 100.0, "mirostat_tau", "must be between 0 and 100", self.mirostat_tau)
        _check(0.0 <= self.mirostat_eta <= 1.0, "mirostat_eta", "must be between 0 and 1", self.mirostat_eta)
        if self.thinking_token_budget == -1:
            self.thinking_token_budget = None
        budget = self.thinking_token_budget
        _check(budget is None or budget >= 0, "thinking_token_budget", "must be -1 (no limit), or not negative", budget)
        _check(self.timeout is None or self.timeout > 0, "timeout", "must be above 0", self.timeout)
        _check(abs(self.length_penalty) <= 100.0, "length_penalty", "must be between -100 and 100", self.length_penalty)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return msgspec.structs.replace(self, **changes)


def _check(ok: bool, param: str, rule: str, value: object) -> None:
    if not ok or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidRequest(f"`{param}` {rule}, got {value!r}", param=param)


_ON_HOST = (
    "prompt_logprobs", "logprob_token_ids", "typical_p", "top_n_sigma", "dynatemp_range", "xtc_probability", "dry_multiplier",
    "mirostat_mode", "thinking_token_budget",
)  # fmt: skip
_OFF_VALUES = tuple((name, getattr(SamplingParams(), name)) for name in _ON_HOST)


DrawsAhead = Literal["is_drawn_by_forward", "is_drawn_on_device"]
"""The property of sampling parameters that tells whose tokens a worker draws by itself."""


class GenerateRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One generation as the engine core sees it: token ids in, resolved parameters, no text."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: list[int] = []
    priority: int = 0  # lower is sooner; only under the priority policy
    cache_salt: str = ""  # requests share cached blocks only with equal salts
    arrival_time: float = 0.0  # seconds, the client's monotonic clock
    grammar: str | None = None  # what the output must match, in the language of `structured/`
    grammar_starts_after: list[int] = []  # tokens of the output behind which the grammar begins; empty: at once
    grammar_opens_with: int | None = None  # with those: only if the output's first token is this one, else at once


class TokenLogprobs(msgspec.Struct, array_like=True):
    """One position: the chosen token first, then the most likely ones in order (the chosen one may appear again)."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the chosen token, 1 is the most likely
    is_ranked: bool = True  # False: behind the chosen token stand those of `logprob_token_ids`


class RequestMetrics(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Seconds on the core's monotonic clock; 0 where it has not happened."""

    arrival_time: float = 0.0
    queued_time: float = 0.0
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    num_preemptions: int = 0


class EngineOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step added to one sample of a request. The last one of a sample carries `finish_reason`, exactly once."""

    request_id: str
    index: int = 0  # which of the n samples
    new_token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # one per new token
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # whole prompt, once, with the first output; first entry None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the token id or string that stopped it; None for eos
    num_cached_tokens: int = 0
    error: str | None = None
    error_type: str | None = None  # class of `errors` the front raises; RequestFailed without one
    error_param: str | None = None
    metrics: RequestMetrics | None = None  # with a sample's first output, as of then, and with its last


class Logprob(msgspec.Struct):
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One sample. With DELTA outputs `text`, `token_ids` and `logprobs` hold only what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestOutput(msgspec.Struct, kw_only=True):
    """The answer to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: str | None = None  # why a sample ended with finish reason "error"


class KvGroup(msgspec.Struct, frozen=True):
    """Layers whose keys and values share one block table.

    Groups have at most `ModelFacts.num_kv_planes` layers each, so that one pool of block ids serves all of them:
    a block id names one block in every plane, and layer `layers[i]` of the group lives in plane i.
    """

    kind: Literal["full", "window"]
    layers: tuple[int, ...]
    window: int = 0  # tokens a query may see, itself included; 0 for full attention

    def max_live_blocks(self, num_tokens: int, *, block_size: int, max_tokens_per_step: int) -> int:
        """Most blocks a request of `num_tokens` owns at one time in this group.

        A window group keeps those of one step: it sees window - 1 earlier tokens and computes its own, and both ends
        may cut a block.
        """
        whole = -(-num_tokens // block_size)
        if self.kind == "full":
            return whole
        return min(whole, (self.window + max_tokens_per_step - 2) // block_size + 2)


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the core may know of a model: facts, never architecture names (those are for display)."""

    architecture: str
    vocab_size: int
    max_model_len: int  # as trained, before --max-model-len
    num_layers: int
    kv_groups: tuple[KvGroup, ...]
    num_kv_planes: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # of the checkpoint: "float32", "bfloat16", "float16" or a GGUF type name
    num_parameters: int = 0
    even_position: int = 0  # where in a context attention takes as many multiplications a token as the layers' weights; 0: unknown
