"""Drives a worker from hand-written plans: logprobs of every position of a text, cut into chunks at will."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pagoda.base.config import ModelConfig
from pagoda.base.plan import NewRequest, Scheduled, StepPlan
from pagoda.base.types import ModelFacts, SamplingParams
from pagoda.models.catalog import build_model, describe
from pagoda.models.decoder import Model
from pagoda.worker.batch import BatchBuilder, Sizes
from pagoda.worker.graphs import make_forward
from pagoda.worker.kv_store import KvStore
from pagoda.worker.runner import Runner
from pagoda.worker.table import RequestTable

BLOCK = 16


def load(path: Path, *, dtype: str = "float32", max_len: int = 256) -> tuple[Model, ModelFacts]:
    source = describe(path, ModelConfig())
    return build_model(source, dtype=dtype, max_positions=max_len), source.spec.facts()


def make_runner(
    model: Model,
    facts: ModelFacts,
    *,
    eager: bool,
    native: bool = True,
    kv_dtype: str = "float32",
    max_tokens: int = 128,
    max_seqs: int = 8,
    max_len: int = 256,
    num_blocks: int = 256,
) -> Runner:
    sizes = Sizes(max_tokens, max_seqs, max_tokens, -(-max_len // BLOCK))
    store = KvStore(facts, dtype=kv_dtype, block_size=BLOCK, num_blocks=num_blocks)
    builder = BatchBuilder(sizes, len(facts.kv_groups), BLOCK)
    table = RequestTable(
        max_num_seqs=max_seqs, max_model_len=max_len, num_groups=len(facts.kv_groups), max_blocks=sizes.max_blocks
    )
    return Runner(table, builder, make_forward(model, builder, store, eager=eager, native=native), store)


def score(runner: Runner, facts: ModelFacts, ids: list[int], chunks: list[int]) -> np.ndarray:
    """Log-probabilities (len(ids), vocabulary) after each token, computed chunk by chunk."""
    assert sum(chunks) == len(ids)
    per_group = -(-len(ids) // BLOCK)
    blocks = [list(range(1 + g * per_group, 1 + (g + 1) * per_group)) for g in range(len(facts.kv_groups))]
    params = SamplingParams(temperature=0, seed=1, prompt_logprobs=-1, logprobs=-1)
    new = [NewRequest(slot=3, request_id="a", token_ids=ids, num_prompt_tokens=len(ids), params=params, block_ids=blocks)]
    found, done = [], 0
    for step, count in enumerate(chunks):
        runner.forward(StepPlan(step=step, new=new if step == 0 else [], scheduled=[Scheduled(3, done, count)]))
        row = runner.sample(step).rows[0]
        assert row.error is None, row.error
        found += row.prompt_logprobs
        done += count
    assert row.logprobs is not None
    table_NV = np.empty((len(ids), facts.vocab_size))
    for i, position in enumerate([*found, *row.logprobs]):
        table_NV[i, position.token_ids] = position.logprobs
    runner.forward(StepPlan(step=len(chunks), released_slots=[3]))
    runner.sample(len(chunks))
    return table_NV
