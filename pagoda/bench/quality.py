"""`pagoda bench quality`: what quantized weights and 16-bit arithmetic cost in answers.

The model as it would be served reads a text, and so does a reference: the same weights as float32, blocks dequantized,
activations and KV cache in float32. At every position both give a distribution over the whole vocabulary:

    perplexity      exp(mean of -log p(next token of the text)), of each; their ratio is what quantization costs
    KL divergence   sum over the vocabulary of p_ref (log p_ref - log p), per position
    same top token  positions where both would go on alike at temperature 0

The text is read in chunks of --chunk-len tokens that know nothing of each other, as llama.cpp's perplexity does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pagoda.base.config import EngineConfig, field
from pagoda.base.errors import ConfigError, RequestFailed
from pagoda.base.types import GenerateRequest, SamplingParams, TokenLogprobs
from pagoda.bench.passage import PASSAGE
from pagoda.bench.report import Report, Row, Spread
from pagoda.executor.launch import LocalEngine, build_engine

__all__ = ["Options", "chunks_of", "measure", "score"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is read, and against what."""

    text_file: str | None = field(None, "text to read (default: a passage that comes with Pagoda)")
    num_tokens: int = field(1024, "at most that many tokens of it")
    chunk_len: int = field(128, "tokens a chunk; longer ones take more memory: the whole vocabulary is kept for each position")
    reference: str | None = field(None, "model to compare with, as float32 (default: the same one)", metavar="MODEL")


@dataclass(frozen=True)
class _Chunk:
    """What both said about one chunk: per scored position, in nats."""

    loss: np.ndarray
    loss_reference: np.ndarray
    divergence: np.ndarray
    is_same_top: np.ndarray


def measure(options: Options, config: EngineConfig) -> Report:
    """Raises ConfigError for options that cannot be measured, and what loading the models raises."""
    if options.chunk_len < 2 or options.num_tokens < 2:
        raise ConfigError("`--chunk-len` and `--num-tokens` must be at least 2")
    text = _read(options.text_file)
    config = _small(config)
    engine = build_engine(config)
    try:
        reference = build_engine(_as_reference(config, options.reference), dequantize=True)
        try:
            return _compare(options, engine, reference, text)
        finally:
            reference.close()
    finally:
        engine.close()


def _compare(options: Options, engine: LocalEngine, reference: LocalEngine, text: str) -> Report:
    if engine.facts.vocab_size != reference.facts.vocab_size:
        raise ConfigError(
            f"`--reference` has a vocabulary of {reference.facts.vocab_size} tokens and the model one of {engine.facts.vocab_size}; they cannot be compared"
        )
    prefix = engine.tokenizer.encode("")
    ids = engine.tokenizer.encode(text, add_special_tokens=False)[: options.num_tokens]
    limit = min(int(e.config.model.max_model_len or 0) for e in (engine, reference))
    chunks = chunks_of(ids, min(options.chunk_len, limit - 1 - len(prefix)))
    done = [_read_both(engine, reference, [*prefix, *chunk]) for chunk in tqdm(chunks, desc="Chunks")]
    rows = [
        Row("weights", "Weights", _weights(engine)),
        Row("weights_reference", "Weights, reference", _weights(reference)),
        *_rows(done),
    ]
    title = f"Quality: {engine.source.path.name} against float32, {len(ids)} tokens in {len(chunks)} chunks"
    return Report(title, rows, dataclasses.asdict(options))


def chunks_of(ids: Sequence[int], chunk_len: int) -> list[list[int]]:
    """Runs of `chunk_len` tokens; a last one of a single token, which would score nothing, is left out."""
    chunks = [list(ids[start : start + chunk_len]) for start in range(0, len(ids), chunk_len)]
    return [chunk for chunk in chunks if len(chunk) > 1]


def _read_both(engine: LocalEngine, reference: LocalEngine, ids: list[int]) -> _Chunk:
    targets = np.array(ids[1:])
    logp_TV, logq_TV = score(reference, ids), score(engine, ids)
    rows = np.arange(len(targets))
    return _Chunk(
        loss=-logq_TV[rows, targets],
        loss_reference=-logp_TV[rows, targets],
        divergence=(np.exp(logp_TV) * (logp_TV - logq_TV)).sum(axis=1, dtype=np.float64),
        is_same_top=np.argmax(logp_TV, axis=1) == np.argmax(logq_TV, axis=1),
    )


def score(engine: LocalEngine, ids: Sequence[int]) -> np.ndarray:
    """log p(. | ids[: t + 1]) for every position but the last -> float32 (len(ids) - 1, vocabulary)."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
    engine.core.add(GenerateRequest(request_id="quality", prompt_token_ids=list(ids), params=params))
    found: list[TokenLogprobs | None] = []
    while engine.core.has_work():
        for output in engine.core.step():
            found += output.prompt_logprobs or ()
            if output.error:
                raise RequestFailed(output.error)
    logp_TV = np.empty((len(ids) - 1, engine.facts.vocab_size), np.float32)
    for row, position in zip(logp_TV, found[1:], strict=True):
        assert position is not None
        row[position.token_ids[1:]] = position.logprobs[1:]  # the first is the text's own token, which comes again
    return logp_TV


def _rows(done: Sequence[_Chunk]) -> list[Row]:
    loss = np.concatenate([chunk.loss for chunk in done]).astype(np.float64)
    loss_reference = np.concatenate([chunk.loss_reference for chunk in done]).astype(np.float64)
    divergence = np.concatenate([chunk.divergence for chunk in done])
    perplexity, perplexity_reference = float(np.exp(loss.mean())), float(np.exp(loss_reference.mean()))
    spread = Spread(divergence.tolist())
    same = float(np.concatenate([chunk.is_same_top for chunk in done]).mean())
    return [
        Row("num_positions", "Positions", len(loss)),
        Row("perplexity", "Perplexity", perplexity),
        Row("perplexity_reference", "Perplexity, reference", perplexity_reference),
        Row("perplexity_ratio", "Ratio", perplexity / perplexity_reference),
        *spread.rows("kl_divergence", "KL divergence", "nats"),
        Row("max_kl_divergence", "KL divergence, largest", float(divergence.max()), "nats"),
        Row("same_top_token", "Same top token", 100 * same, "%"),
        Row("rms_delta_p", "Change of p(text's token), RMS", 100 * float(np.sqrt(np.mean((np.exp(-loss) - np.exp(-loss_reference)) ** 2))), "%"),
    ]


def _weights(engine: LocalEngine) -> str:
    return f"{'+'.join(engine.ledger.formats)} {engine.ledger.weights_nbytes / 2**20:.0f} MiB"


def _small(config: EngineConfig) -> EngineConfig:
    """One request at a time, so that the KV cache is for just that, and two models fit where one would have taken all memory."""
    model = config.model if config.model.max_model_len is not None else replace(config.model, max_model_len="auto")
    return replace(config, model=model, scheduler=replace(config.scheduler, max_num_seqs=1))


def _as_reference(config: EngineConfig, model: str | None) -> EngineConfig:
    changed = replace(config.model, dtype="float32", model=model or config.model.model)
    if model:
        changed = replace(changed, tokenizer=None)
    return replace(config, model=changed, cache=replace(config.cache, kv_cache_dtype="float32"))


def _read(path: str | None) -> str:
    if path is None:
        return PASSAGE
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`--text-file {path}` cannot be read: {error}") from None
