"""A model loaded in this process, as commands that need no server use it: the server's parsers in front of the same engine."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from pagoda.api.async_engine import AsyncEngine
from pagoda.api.processor import Processor, PromptDict, sampling_defaults
from pagoda.base.config import EngineConfig
from pagoda.base.types import RequestOutput
from pagoda.engine.client import ThreadClient
from pagoda.executor.launch import LocalEngine, build_engine
from pagoda.serve.context import ModelContext
from pagoda.serve.generation import Call

__all__ = ["LocalModel", "load_model"]


@dataclass(frozen=True)
class LocalModel:
    """For one event loop: the first that asks `engine` for something."""

    engine: AsyncEngine
    context: ModelContext
    local: LocalEngine

    @property
    def name(self) -> str:
        return self.context.model_names[0]

    async def answer(self, call: Call, request_id: str, prompt_idx: int = 0) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one prompt of a call. Closing the iterator aborts the request."""
        given = call.prompts[prompt_idx]
        prompt: PromptDict = {"prompt": given["prompt"], "prompt_token_ids": given["prompt_token_ids"]}
        outputs = self.engine.generate(prompt, call.params, request_id, priority=call.priority, cache_salt=call.cache_salt)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()


def load_model(config: EngineConfig) -> LocalModel:
    """Raises ConfigError, ModelFileError, UnsupportedModel or OutOfMemory."""
    local = build_engine(config)
    front, config = local.front, local.config
    processor = Processor(
        config, local.facts, front.tokenizer,
        generation_config=front.generation_config, eos_token_ids=front.eos_token_ids,
    )  # fmt: skip
    context = ModelContext(
        model_names=tuple(config.model.served_model_name) or (front.name,),
        model_path=str(front.path),
        max_model_len=processor.max_model_len,
        max_logprobs=config.model.max_logprobs,
        tokenizer=front.tokenizer,
        template=front.template,
        default_params=sampling_defaults(front.generation_config),
        created=int(time.time()),
    )
    return LocalModel(AsyncEngine(ThreadClient(local.core), processor, on_shutdown=local.close), context, local)
