"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Literal

import msgspec

from pagoda.serve.context import ModelContext

__all__ = ["ModelCard", "ModelList", "list_models", "retrieve_model"]


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pagoda"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def list_models(context: ModelContext) -> ModelList:
    """One card per served name."""
    return ModelList(data=[_card(name, context) for name in context.model_names])


def retrieve_model(name: str, context: ModelContext) -> ModelCard:
    """The card of one name. Raises NotFound."""
    context.check_model(name)
    return _card(name, context)


def _card(name: str, context: ModelContext) -> ModelCard:
    return ModelCard(id=name, created=context.created, root=context.model_path, max_model_len=context.max_model_len)
