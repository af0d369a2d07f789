"""The order of operations and each sampling parameter, on hand-made logits; logprobs; failures that stay with their row."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda.base.plan import Masks, NewRequest, Scheduled, StepPlan, StepRow
from pagoda.base.types import SamplingParams
from pagoda.kernels import ops
from pagoda.worker.batch import BatchBuilder, Sizes
from pagoda.worker.logits import STEPS
from pagoda.worker.logits.step import RowContext
from pagoda.worker.sampler import Sampler, top_logprobs
from pagoda.worker.table import RequestTable

VOCAB = 40


def run(
    params: list[SamplingParams],
    logits_RV: np.ndarray,
    *,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    stop_ids: list[int] | None = None,
    masks: Masks | None = None,
) -> list[StepRow]:
    """Samples one row per request, each with the given prompt and output so far."""
    prompt, output = prompt or [1, 2, 3], output or []
    known = [*prompt, *output]
    table = RequestTable(max_num_seqs=len(params), max_model_len=64, num_groups=1, max_blocks=4)
    builder = BatchBuilder(Sizes(64 * len(params), len(params), 64 * len(params), 4), 1, 16)
    new = [
        NewRequest(
            slot=i, request_id=str(i), token_ids=known, num_prompt_tokens=len(prompt), params=p.clone(seed=p.seed or i),
            stop_ids=stop_ids or [], block_ids=[[1 + i]],
        )
        for i, p in enumerate(params)
    ]  # fmt: skip
    plan = StepPlan(step=0, new=new, scheduled=[Scheduled(i, len(known) - 1, 1) for i in range(len(params))])
    table.apply(plan)
    rows = builder.build(plan, table)
    found = Sampler().sample(logits_RV.astype(np.float32), rows, table, masks)
    for i, row in enumerate(found):
        assert table.num_tokens_N[i] == len(known) + len(row.token_ids)
    return found


def greedy(**kwargs: object) -> SamplingParams:
    return SamplingParams(temperature=0, **kwargs)  # type: ignore[arg-type]


def logits(*largest: tuple[int, float]) -> np.ndarray:
    row = np.full((1, VOCAB), -5.0, np.float32)
    for token, value in largest:
        row[0, token] = value
    return row


def chosen(params: SamplingParams, row: np.ndarray, **kwargs: object) -> int:
    return run([params], row, **kwargs)[0].token_ids[0]  # type: ignore[arg-type]


def test_greedy_takes_the_largest_and_the_lowest_id_on_ties() -> None:
    assert chosen(greedy(), logits((7, 3.0), (4, 3.0), (9, 2.0))) == 4


def test_allowed_token_ids() -> None:
    assert chosen(greedy(allowed_token_ids=[9, 11]), logits((7, 3.0), (11, 1.0))) == 11


def test_logit_bias() -> None:
    assert chosen(greedy(logit_bias={11: 3.0}), logits((7, 3.0), (11, 1.0))) == 11
    assert chosen(greedy(logit_bias={7: -100}), logits((7, 3.0), (11, 1.0))) == 11


def test_bad_words() -> None:
    row = logits((7, 3.0), (11, 1.0))
    assert chosen(greedy(bad_words_token_ids=[[7]]), row) == 11
    assert chosen(greedy(bad_words_token_ids=[[5, 7]]), row) == 7
    assert chosen(greedy(bad_words_token_ids=[[5, 7]]), row, output=[6, 5]) == 11
    assert chosen(greedy(bad_words_token_ids=[[3, 7]]), row) == 7, "the prompt's tokens do not count"


def test_min_tokens_forbids_stopping() -> None:
    row = logits((7, 3.0), (11, 1.0))
    assert chosen(greedy(min_tokens=2), row, stop_ids=[7]) == 11
    assert chosen(greedy(min_tokens=2), row, stop_ids=[7], output=[4, 4]) == 7


def test_repetition_penalty_divides_positive_and_multiplies_negative() -> None:
    assert chosen(greedy(repetition_penalty=2.0), logits((2, 3.0), (11, 1.6))) == 11, "prompt tokens count"
    assert chosen(greedy(repetition_penalty=2.0), logits((9, 3.0), (11, 1.6)), output=[9]) == 11
    row = np.full((1, VOCAB), -9.0, np.float32)
    row[0, [2, 11]] = [-1.0, -1.5]
    assert chosen(greedy(repetition_penalty=2.0), row) == 11


def test_presence_and_frequency_count_output_only() -> None:
    row = logits((9, 3.0), (11, 1.6), (2, 1.7))
    assert chosen(greedy(presence_penalty=1.5), row, output=[9, 9]) == 2
    assert chosen(greedy(frequency_penalty=0.7), row, output=[9]) == 9
    assert chosen(greedy(frequency_penalty=0.7), row, output=[9, 9]) == 2, "twice 0.7"
    assert chosen(greedy(presence_penalty=2.0), row) == 9, "nothing is out yet"


def test_order_bias_acts_before_penalties() -> None:
    # (1 + 3) / 2 = 2 loses to 2.5; had the bias come after the penalty, 1 / 2 + 3 = 3.5 would have won.
    assert chosen(greedy(logit_bias={2: 3.0}, repetition_penalty=2.0), logits((2, 1.0), (11, 2.5))) == 11


def test_order_allowed_comes_before_bias() -> None:
    assert chosen(greedy(allowed_token_ids=[4, 5], logit_bias={7: 100.0, 5: 1.0}), logits((7, 3.0))) == 5


def test_a_row_with_only_a_mask() -> None:
    """Masked in one addition: what it forbids is never drawn, and what is not finite still fails that row alone."""
    allowed = np.zeros((VOCAB + 31) // 32 * 32, np.uint8)
    allowed[[3, 5]] = 1
    words = np.tile(np.packbits(allowed, bitorder="little"), 3)
    masks = Masks(slots=[0, 1, 2], words=words.tobytes())
    rows_RV = np.repeat(logits((7, 9.0), (5, 1.0)), 4, 0)
    rows_RV[1, 9], rows_RV[2, 5] = np.nan, np.inf
    found = run([greedy(), greedy(), greedy(), greedy()], rows_RV, masks=masks)
    assert [row.token_ids for row in found] == [[5], [], [], [7]]
    assert [row.error is None for row in found] == [True, False, False, True]


def test_masked_rows_among_others_are_drawn_as_if_the_mask_were_on_their_logits() -> None:
    """Masks come in another order than rows, and some rows have none; penalties send a masked row through the other path."""
    rng = np.random.default_rng(4)
    logits_RV = rng.standard_normal((9, VOCAB)).astype(np.float32) * 2
    bits = np.zeros((9, (VOCAB + 31) // 32 * 32), np.uint8)
    bits[:, :VOCAB] = rng.random((9, VOCAB)) < 0.4
    bits[:, 5] = 1
    slots = [7, 2, 4, 0, 8]
    masks = Masks(slots=slots, words=np.packbits(bits[slots], axis=1, bitorder="little").tobytes())
    params = [SamplingParams(temperature=0.9, top_p=0.9, min_p=0.01, seed=i) for i in range(9)]
    params[2], params[8] = greedy(), params[8].clone(logit_bias={6: 0.0}, logprobs=1)
    laid_RV = logits_RV.copy()
    laid_RV[slots] = np.where(bits[slots][:, :VOCAB] == 1, laid_RV[slots], -np.inf)
    expected = [row.token_ids for row in run(params, laid_RV)]
    assert [row.token_ids for row in run(params, logits_RV, masks=masks)] == expected
    assert expected != [row.token_ids for row in run(params, logits_RV)]


def test_grammar_mask_is_last_and_only_for_its_slot() -> None:
    words = np.zeros((1, 2), np.uint32)
    words[0, 0] = 1 << 11 | 1 << 12
    masks = Masks(slots=[1], words=words.tobytes())
    rows = run([greedy(), greedy(logit_bias={12: 9.0})], np.repeat(logits((7, 3.0), (11, 1.0)), 2, 0), masks=masks)
    assert [row.token_ids[0] for row in rows] == [7, 12]


def test_rows_that_need_steps_draw_the_same_numbers_as_plain_ones() -> None:
    """A neutral step sends a row through the other path; the token must not change."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        row = rng.standard_normal((1, VOCAB)).astype(np.float32) * 2
        plain = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.02, seed=seed)
        stepped = plain.clone(logit_bias={5: 0.0}, logprobs=3)
        assert chosen(plain, row) == chosen(stepped, row)


def test_random_rows_follow_their_seed_and_position_only() -> None:
    rng = np.random.default_rng(1)
    row = rng.standard_normal((1, VOCAB)).astype(np.float32)
    params = SamplingParams(temperature=1.0, seed=7)
    alone = chosen(params, row)
    crowd = run([SamplingParams(temperature=1.5, seed=3), params, greedy()], np.repeat(row, 3, 0))
    assert crowd[1].token_ids == [alone]
    drawn = {chosen(SamplingParams(temperature=1.0, seed=s), row) for s in range(1, 60)}
    assert len(drawn) > 5
    moved = {chosen(params, row, output=[4] * k) for k in range(20)}
    assert len(moved) > 3, "the position is part of the random number"


def test_logprobs_are_of_the_raw_logits() -> None:
    row = np.random.default_rng(2).standard_normal((1, VOCAB)).astype(np.float32) * 3
    expected = row[0].astype(np.float64) - np.log(np.exp(row[0].astype(np.float64)).sum())
    params = greedy(logprobs=4, logit_bias={5: 100.0})
    found = run([params], row)[0]
    assert found.token_ids == [5] and found.logprobs is not None
    position = found.logprobs[0]
    assert position.token_ids[0] == 5
    assert position.rank == 1 + int((expected > expected[5]).sum())
    assert position.token_ids[1:] == np.argsort(-expected)[:4].tolist()
    np.testing.assert_allclose(position.logprobs, expected[position.token_ids], atol=1e-5)


def test_logprobs_of_the_whole_vocabulary_and_of_none() -> None:
    row = np.random.default_rng(3).standard_normal((1, VOCAB)).astype(np.float32)
    whole = run([greedy(logprobs=-1)], row)[0].logprobs
    assert whole is not None and sorted(whole[0].token_ids[1:]) == list(range(VOCAB))
    zero = run([greedy(logprobs=0)], row)[0].logprobs
    assert zero is not None and len(zero[0].token_ids) == 1
    assert run([greedy()], row)[0].logprobs is None


def test_top_logprobs_breaks_ties_by_id() -> None:
    row = np.array([1.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    assert top_logprobs(row, 4, 2, 0.0).token_ids == [4, 1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_logits_fail_their_row_alone(bad: float) -> None:
    rows = np.repeat(logits((7, 3.0)), 3, 0)
    rows[1, 12] = bad
    found = run([greedy(), greedy(logprobs=1), greedy()], rows)
    assert [row.token_ids for row in found] == [[7], [], [7]]
    assert found[1].error is not None and "not finite" in found[1].error
    assert found[0].error is None


def test_everything_forbidden_is_an_error_not_a_guess() -> None:
    found = run([greedy(allowed_token_ids=[4], bad_words_token_ids=[[4]])], logits((7, 3.0)))[0]
    assert found.token_ids == [] and found.error is not None


def test_steps_want_only_what_they_serve() -> None:
    assert [type(s).__name__ for s in STEPS if s.wants(SamplingParams())] == []


def test_steps_change_one_row_in_place() -> None:
    row = np.zeros(VOCAB, np.float32)
    context = RowContext(SamplingParams(allowed_token_ids=[3]), np.array([1, 2], np.int32), 2, [])
    STEPS[0].apply(row, context)
    assert np.isneginf(row).sum() == VOCAB - 1 and row[3] == 0
    assert bool(ops.row_is_finite(row[None])[0])
