"""Token embedding and language head. Tied models keep one packed table for both."""

from __future__ import annotations

from typing import Any

from pagoda.kernels import ops
from pagoda.kernels.weight import Weight
from pagoda.loader.slot import check_shape
from pagoda.loader.tensor import SourceTensor
from pagoda.quant.scheme import Precision, Scheme, scheme_for

__all__ = ["VocabTable"]


class VocabTable:
    """A (vocabulary, hidden) table: read by rows as an embedding, multiplied by as a head."""

    is_optional = False

    def __init__(self, vocab_size: int, hidden_size: int, *, precision: Precision) -> None:
        self.shape: tuple[int, ...] = (vocab_size, hidden_size)
        self._precision = precision
        self._weight: Weight | None = None
        self._scheme: Scheme | None = None

    @property
    def is_loaded(self) -> bool:
        return self._weight is not None

    @property
    def is_packed(self) -> bool:
        return self.is_loaded

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes if self._weight else 0

    @property
    def formats(self) -> set[str]:
        return {self._weight.format} if self._weight else set()

    def slots(self, prefix: str) -> dict[str, Any]:
        return {f"{prefix}.weight": self}

    def load(self, source: SourceTensor) -> None:
        check_shape(source, self.shape)
        self._scheme = scheme_for(source)
        self._weight = self._scheme.pack([source], self._precision, is_table=True)

    def embed(self, token_ids_T: Any, *, scale: float) -> Any:
        """-> x_TD float32, rows times `scale`."""
        assert self._weight is not None
        return ops.embedding(token_ids_T, self._weight, scale=scale)

    def project(self, hidden_RD: Any) -> Any:
        """-> logits_RV float32."""
        assert self._weight is not None and self._scheme is not None
        return self._scheme.apply(hidden_RD, self._weight, None, residual=None, out=None)
