"""Steps that change logits before a token is chosen. The order is part of the contract:

    1 allowed_token_ids   everything else becomes -inf
    2 bad_words           a token that would complete a banned sequence becomes -inf
    3 min_tokens          eos and stop ids become -inf until enough tokens are out
    4 logit_bias          added
    5 penalties           repetition, then frequency and presence
    6 DRY                 what would make a repetition longer becomes less likely
    7 plug-ins            `--logits-processors`
      thinking budget     when it is used up only the end of the reasoning is left

then the grammar's mask (`banned_strings` is one too), then, for rows that are drawn:

    8 top_n_sigma    9 dynamic temperature    10 typical_p
    11 XTC, which does min_p, top_k and top_p itself, before it
    or Mirostat 2 in the place of 11 and of min_p, top_k and top_p

A step is added by writing a file here and one line in `chain.py`.
"""

from __future__ import annotations

from pagoda.worker.logits.chain import SHAPERS, STEPS, Chain, chain_of
from pagoda.worker.logits.mirostat import Mirostat
from pagoda.worker.logits.processors import ProcessorFailed, load_processors
from pagoda.worker.logits.step import LogitsStep, RowContext

__all__ = ["SHAPERS", "STEPS", "Chain", "LogitsStep", "Mirostat", "ProcessorFailed", "RowContext", "chain_of", "load_processors"]
