"""A real core over a scripted worker and a byte tokenizer: the API without a model.

Sample with seed s of prompt P answers `script(P, s)`, a byte per token, then eos.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers

from pagoda.base.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagoda.base.plan import Masks, NewRequest, StepPlan, StepResult, StepRow
from pagoda.base.types import KvGroup, ModelFacts, TokenLogprobs
from pagoda.engine.core import EngineCore
from pagoda.text.template import ChatTemplate
from pagoda.text.tokenizer import Tokenizer

EOS = 257
VOCAB = 258
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if tools %}[{{ tools | length }} tools]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)


def byte_tokenizer() -> Tokenizer:
    """256 bytes and two special tokens; nothing is merged."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    return Tokenizer(backend, special_tokens={"eos_token": "<eos>"}, eos_ids=[EOS])


Script = Callable[[str, int], str]


def shout(prompt: str, seed: int) -> str:
    return f"{prompt.upper()} {seed}"


class ScriptedExecutor:
    """`delay` seconds a step; `row_errors`: prompts whose second token fails; `bug`: what the next step raises."""

    def __init__(self, tokenizer: Tokenizer, script: Script) -> None:
        self.delay = 0.0
        self.row_errors: set[str] = set()
        self.bug: BaseException | None = None
        self._tokenizer, self._script = tokenizer, script
        self._slots: dict[int, NewRequest] = {}
        self._plan = StepPlan(step=-1)

    def forward(self, plan: StepPlan) -> None:
        for slot in plan.released_slots:
            self._slots.pop(slot, None)
        self._slots.update({new.slot: new for new in plan.new})
        self._plan = plan

    def sample(self, step: int, masks: Masks | None = None) -> StepResult:
        time.sleep(self.delay)
        if self.bug is not None:
            bug, self.bug = self.bug, None
            raise bug
        return StepResult(step=step, rows=[self._row(row.slot, row.num_computed, row.num_planned) for row in self._plan.scheduled])

    def _row(self, slot: int, begin: int, count: int) -> StepRow:
        new, row, end = self._slots[slot], StepRow(slot=slot), begin + count
        if new.params.prompt_logprobs is not None:
            row.prompt_logprobs = [_logprob(i) for i in new.token_ids[begin + 1 : min(end, new.num_prompt_tokens - 1) + 1]]
        num_output = end - new.num_prompt_tokens
        if num_output < 0:
            return row
        prompt = self._tokenizer.decode(new.token_ids[: new.num_prompt_tokens])
        if num_output and prompt in self.row_errors:
            return StepRow(slot=slot, error="non-finite logits")
        answer = [*self._tokenizer.encode(self._script(prompt, new.params.seed or 0)), EOS]
        row.token_ids = [answer[num_output]]
        if new.params.logprobs is not None:
            row.logprobs = [_logprob(answer[num_output])]
        return row

    def call(self, method: str, *args: object) -> object:
        return None

    def check(self) -> None:
        return None

    def stop(self) -> None:
        return None


def _logprob(token_id: int) -> TokenLogprobs:
    return TokenLogprobs([token_id, (token_id + 1) % VOCAB], [-0.5, -1.5], 1)


@dataclass
class Front:
    tokenizer: Tokenizer
    template: ChatTemplate | None
    generation_config: dict[str, Any]
    eos_token_ids: list[int]


class FakeEngine:
    """What `executor.launch.build_engine` returns, as far as the API looks."""

    def __init__(self, script: Script = shout, *, max_model_len: int = 200, generation_config: dict[str, Any] | None = None,
                 max_logprobs: int = 5, **scheduler: Any) -> None:
        tokenizer = byte_tokenizer()
        self.config = EngineConfig(
            model=ModelConfig(max_model_len=max_model_len, max_logprobs=max_logprobs),
            cache=CacheConfig(block_size=16),
            scheduler=SchedulerConfig(**{"max_num_seqs": 16, "max_num_batched_tokens": 64, **scheduler}),
        )
        self.facts = ModelFacts(
            architecture="toy", vocab_size=VOCAB, max_model_len=max_model_len, num_layers=1, kv_groups=(KvGroup("full", (0,)),),
            num_kv_planes=1, num_kv_heads=1, head_dim=1, dtype="float32",
        )
        self.executor = ScriptedExecutor(tokenizer, script)
        self.core = EngineCore(self.config, self.facts, 500, self.executor, max_logits_rows=64)
        self.front = Front(tokenizer, ChatTemplate({"default": TEMPLATE}, {}), generation_config or {}, [EOS])
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def check_whole(self) -> None:
        """Nothing is left in the core."""
        assert self.core.is_idle and not self.core.has_work()
        self.core.check_integrity()
        assert self.core.stats().kv_cache_usage_perc == 0.0
