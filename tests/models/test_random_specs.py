"""Fifty random models: each is recorded as one program, equals itself run op by op bit for bit, and the references within
tolerance. The decoder must not know which families exist."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda.kernels import gguf_blocks, table
from pagoda.kernels.cpu import library
from pagoda.layers.attention import AttentionSpec
from pagoda.layers.mlp import MlpSpec
from pagoda.layers.rope import RopeSpec
from pagoda.loader.tensor import SourceTensor
from pagoda.models.decoder import Decoder
from pagoda.models.spec import BlockSpec, ModelSpec
from pagoda.quant.scheme import Precision
from tests.models.harness import make_runner, score

NUM_SPECS = 50
LENGTH = 50


def random_spec(rng: np.random.Generator) -> ModelSpec:
    def flip() -> bool:
        return bool(rng.integers(2))

    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    head_dim = int(rng.choice([8, 16, 24, 32, 64]))
    rotary = head_dim if flip() else head_dim // 2
    windows = [0, int(rng.integers(1, 40))] if flip() else [0 if flip() else int(rng.integers(1, 40))]
    qkv_bias, out_bias, qk_norm, post_norms, mlp_bias = flip(), flip(), flip(), flip(), flip()
    soft_cap = float(rng.choice([0.0, 5.0, 50.0]))
    activation = str(rng.choice(["silu", "gelu_tanh", "gelu", "relu"]))
    intermediate = 32 * int(rng.integers(1, 5))
    blocks = tuple(
        BlockSpec(
            AttentionSpec(
                num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5,
                rope=RopeSpec(float(rng.choice([1e4, 1e6])), rotary), window=int(rng.choice(windows)), soft_cap=soft_cap,
                qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm,
            ),
            MlpSpec(intermediate, activation, bias=mlp_bias),  # type: ignore[arg-type]
            post_norms=post_norms,
        )
        for _ in range(int(rng.integers(1, 5)))
    )  # fmt: skip
    return ModelSpec(
        architecture="Random", vocab_size=int(rng.integers(20, 300)), hidden_size=32 * int(rng.integers(1, 5)), blocks=blocks,
        norm_eps=1e-5, max_model_len=128, norm_plus_one=flip(), tie_embeddings=flip(),
        embed_scale=float(rng.choice([1.0, 5.5])), logit_soft_cap=float(rng.choice([0.0, 30.0])),
    )  # fmt: skip


def build(spec: ModelSpec, rng: np.random.Generator, *, dtype: str, block_type: str | None) -> Decoder:
    model = Decoder(spec, precision=Precision(dtype), max_positions=128)
    for name, slot in model.slots().items():
        values = rng.standard_normal(slot.shape, np.float32) * np.float32(0.3 if len(slot.shape) == 1 else slot.shape[-1] ** -0.5)
        if block_type and len(slot.shape) == 2 and slot.shape[1] % 32 == 0:
            slot.load(SourceTensor(name, gguf_blocks.quantize(block_type, values), slot.shape, block_type))
        else:
            slot.load(SourceTensor(name, values, slot.shape))
    model.finish()
    return model


@pytest.mark.parametrize("seed", range(NUM_SPECS))
def test_random_model(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = random_spec(rng)
    dtype, block_type, tolerance = [
        ("float32", None, 1e-4),
        ("bfloat16", None, 0.15),
        ("float32", "Q8_0", 2e-3),
        ("float32", "Q4_0", 2e-3),
        ("float32", "Q4_1", 2e-3),
    ][seed % 5]
    model, facts = build(spec, rng, dtype=dtype, block_type=block_type), spec.facts()
    ids = rng.integers(0, spec.vocab_size, LENGTH).tolist()
    chunks = [int(rng.integers(1, LENGTH)), 0]
    chunks[1] = LENGTH - chunks[0]

    runner = make_runner(model, facts, eager=False)
    assert runner.mode[0] == "recorded"
    recorded = score(runner, facts, ids, chunks)
    op_by_op = score(make_runner(model, facts, eager=True), facts, ids, [LENGTH])
    np.testing.assert_array_equal(recorded, op_by_op)
    with table.backend("reference"):
        expected = score(make_runner(model, facts, eager=True, native=False), facts, ids, [LENGTH])
    np.testing.assert_allclose(recorded, expected, atol=tolerance)


def test_one_native_call_per_forward() -> None:
    rng = np.random.default_rng(0)
    spec = random_spec(rng)
    model, facts = build(spec, rng, dtype="float32", block_type=None), spec.facts()
    calls = {}
    for eager in (False, True):
        runner = make_runner(model, facts, eager=eager)
        score(runner, facts, list(range(10)), [10])  # everything is loaded and warm
        forward = runner._forward
        rows = _last_rows(runner)
        before = library.default().num_calls
        forward.start(rows, alone=True)
        forward.join()
        calls[eager] = library.default().num_calls - before
    assert calls[False] == 1
    assert calls[True] > 10


def _last_rows(runner):  # type: ignore[no-untyped-def]
    from pagoda.base.plan import NewRequest, Scheduled, StepPlan
    from pagoda.base.types import SamplingParams

    new = NewRequest(slot=0, request_id="x", token_ids=[1, 2, 3], num_prompt_tokens=3, params=SamplingParams(seed=0), block_ids=[[1], [2]])
    groups = runner.table.tables_gNB.shape[0]
    new.block_ids = [[g + 1] for g in range(groups)]
    plan = StepPlan(step=0, new=[new], scheduled=[Scheduled(0, 0, 3)])
    runner.table.apply(plan)
    return runner.builder.build(plan, runner.table)
