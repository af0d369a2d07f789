"""Steps that change logits before a token is chosen, in the order of `STEPS`: the order is part of the contract.

    1 allowed_token_ids   everything else becomes -inf
    2 bad_words           a token that would complete a banned sequence becomes -inf
    3 min_tokens          eos and stop ids become -inf until enough tokens are out
    4 logit_bias          added
    5 penalties           repetition, then frequency and presence

A step is added by writing a file here and one line in STEPS.
"""

from __future__ import annotations

from pagoda.worker.logits.bias import LogitBias
from pagoda.worker.logits.masks import AllowedTokens, BadWords, MinTokens
from pagoda.worker.logits.penalties import Penalties
from pagoda.worker.logits.step import LogitsStep, RowContext

__all__ = ["STEPS", "LogitsStep", "RowContext"]

STEPS: tuple[LogitsStep, ...] = (AllowedTokens(), BadWords(), MinTokens(), LogitBias(), Penalties())
