"""`LLM`: many prompts in, all answers out. The core runs in the caller's thread, step by step, until everything has ended."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from pagoda.api.beam import BeamSearch
from pagoda.api.outputs import RequestStream
from pagoda.api.processor import Processor, Prompt
from pagoda.base.config import EngineConfig, config_from_kwargs
from pagoda.base.errors import InvalidRequest
from pagoda.base.log import get_logger
from pagoda.base.types import FinishReason, ModelFacts, RequestOutput, RequestOutputKind, SamplingParams
from pagoda.engine.core import EngineCore, SampleId
from pagoda.text.template import ChatTemplate
from pagoda.text.tokenizer import Tokenizer

__all__ = ["LLM"]

_log = get_logger("api")

Message = Mapping[str, Any]


class _Front(Protocol):
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def template(self) -> ChatTemplate | None: ...
    @property
    def generation_config(self) -> dict[str, Any]: ...
    @property
    def eos_token_ids(self) -> list[int]: ...


class _Engine(Protocol):
    """The part of `executor.launch.LocalEngine` that is needed here."""

    core: EngineCore
    config: EngineConfig
    facts: ModelFacts

    @property
    def front(self) -> Any:
        """A `_Front`; loaded on first use."""

    def close(self) -> None: ...


class LLM:
    """A model and its engine in this process.

    `model` is a Hugging Face id or folder, or a .gguf file; without it the default model is used. The other arguments
    have the names of the command line's flags. `engine` is one that was built already. Raises ConfigError,
    ModelFileError, UnsupportedModel or OutOfMemory.
    """

    def __init__(self, model: str | None = None, *, engine: _Engine | None = None, **kwargs: Any) -> None:
        if engine is None:
            from pagoda.executor.launch import build_engine  # weights and kernels: only where they are wanted

            engine = build_engine(config_from_kwargs(model, **kwargs))
        elif model is not None or kwargs:
            raise TypeError("`engine` has its model and settings already: give nothing else")
        front: _Front = engine.front
        self._engine = engine
        self._template = front.template
        self._processor = Processor(
            engine.config, engine.facts, front.tokenizer,
            generation_config=front.generation_config, eos_token_ids=front.eos_token_ids,
        )  # fmt: skip
        self._serial = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order.

        A prompt is a string, a list of token ids, or a dict with `prompt` or `prompt_token_ids`; several are a list of
        those. `sampling_params` is for all or one per prompt; without it the model's defaults hold. Raises
        InvalidRequest before anything is computed; a request that fails later ends with finish reason "error".
        """
        items = _as_list(prompts)
        params = self._params_of(sampling_params, len(items))
        if priority is not None and len(priority) != len(items):
            raise InvalidRequest(f"there are {len(items)} prompts and {len(priority)} priorities", param="priority")
        ranks = [0] * len(items) if priority is None else list(priority)
        beams = [place for place, each in enumerate(params) if each.use_beam_search]
        found = dict(zip(beams, self._search([(items[i], params[i]) for i in beams], [ranks[i] for i in beams]), strict=True))
        streams = [self._stream(items[i], params[i], ranks[i]) for i in range(len(items)) if i not in found]
        sampled = iter(self._run(streams, use_tqdm))
        return [found[i] if i in found else next(sampled) for i in range(len(items))]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        beam_width: int,
        max_tokens: int,
        ignore_eos: bool = False,
        length_penalty: float = 1.0,
        logprobs: int | None = None,
    ) -> list[RequestOutput]:
        """The `beam_width` most likely continuations of each prompt, best first; `cumulative_logprob` is a beam's log-probability.

        Needs --max-logprobs of at least twice the width.
        """
        params = SamplingParams(
            n=beam_width, max_tokens=max_tokens, ignore_eos=ignore_eos, length_penalty=length_penalty, logprobs=logprobs,
            use_beam_search=True, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        return self.generate(prompts, params, use_tqdm=False)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or a list of them. `chat_template` is Jinja text that replaces the model's.

        With `continue_final_message` (and `add_generation_prompt` False) the answer goes on with the last message.
        """
        tokenizer = self.get_tokenizer()
        template = self._template
        if chat_template is not None:
            template = ChatTemplate({"default": chat_template}, tokenizer.special_tokens)
        if template is None:
            raise InvalidRequest("the model has no chat template: give `chat_template`, or use `generate`", param="chat_template")
        prompts: list[Prompt] = []
        for conversation in _as_conversations(messages):
            text = template.render(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            ids = tokenizer.encode(text, add_special_tokens=False)  # the template wrote them
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        return self._processor.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none."""
        return self._processor.default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, and nothing changed, while any request runs."""
        return self._engine.core.reset_prefix_cache()

    def close(self) -> None:
        """Releases the engine. The object cannot be used afterwards."""
        self._engine.close()

    # ---- inside

    def _params_of(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        params = [given] * count if isinstance(given, SamplingParams) else list(given)
        if len(params) != count:
            raise InvalidRequest(f"there are {count} prompts and {len(params)} sampling parameters", param="sampling_params")
        return params

    def _stream(self, prompt: Prompt, params: SamplingParams, priority: int) -> RequestStream:
        if params.output_kind is not RequestOutputKind.FINAL_ONLY:
            params = msgspec.structs.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
        request, text = self._processor.process(prompt, params, str(next(self._serial)), priority=priority)
        return RequestStream(request, text, self._processor.tokenizer)

    def _search(self, asked: list[tuple[Prompt, SamplingParams]], priority: list[int]) -> list[RequestOutput]:
        """Beam searches, all of them a step at a time."""
        processed = [self._processor.process(prompt, params, str(next(self._serial))) for prompt, params in asked]
        searches = [BeamSearch(one.request, self._processor.max_model_len) for one in processed]
        while any(not search.is_finished for search in searches):
            streams = [
                [self._stream(ids, search.step_params, rank) for ids in search.prompts()]
                for search, rank in zip(searches, priority, strict=True)
            ]
            outputs = iter(self._run([stream for group in streams for stream in group], False))
            for search, group in zip(searches, streams, strict=True):
                answers = [next(outputs) for _ in group]
                if answers:
                    search.advance(answers)
        tokenizer = self._processor.tokenizer
        return [search.output(one.prompt, tokenizer) for search, one in zip(searches, processed, strict=True)]

    def _run(self, streams: list[RequestStream], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        """Steps the core until all streams have ended. Leaves nothing behind in it, whatever happens."""
        core = self._engine.core
        live = {stream.request.request_id: stream for stream in streams}
        done: dict[str, RequestOutput] = {}
        with _Progress(len(streams), use_tqdm) as progress:
            try:
                for stream in streams:
                    core.add(stream.request)
                while live:
                    for stream in _advance(core, live):
                        output = stream.take()
                        assert output is not None
                        done[output.request_id] = output
                        del live[output.request_id]
                        progress.add(output)
            finally:
                core.abort(list(live))
                while core.has_work():  # also the terminal outputs of samples that stop strings ended
                    core.step()
        return [done[stream.request.request_id] for stream in streams]


def _advance(core: EngineCore, live: Mapping[str, RequestStream]) -> list[RequestStream]:
    """One step; returns the streams that ended in it."""
    ended: list[RequestStream] = []
    stopped: list[SampleId] = []
    for output in core.step():
        stream = live.get(output.request_id)
        if stream is None or stream.is_finished:
            continue
        if stream.push(output):
            stopped.append((output.request_id, output.index))
        if output.finish_reason is FinishReason.ERROR:
            _log.warning("request %s failed: %s", output.request_id, output.error)
        if stream.is_finished:
            ended.append(stream)
    core.abort(stopped, FinishReason.STOP)
    return ended


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many? A list of integers is one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[dict[str, Any]]]:
    """One conversation is a list of dicts, several a list of lists."""
    if all(isinstance(message, Mapping) for message in messages):
        return [[dict(message) for message in messages]]  # type: ignore[arg-type]
    return [[dict(message) for message in conversation] for conversation in messages]  # type: ignore[arg-type]


def _tqdm() -> Callable[..., Any]:
    """Imported when there is a bar to draw: it takes as long as recording a model."""
    from tqdm import tqdm

    return tqdm


class _Progress:
    """The bar: prompts done, and tokens per second in and out. `use_tqdm` may be another bar's class."""

    def __init__(self, total: int, use_tqdm: bool | Callable[..., Any]) -> None:
        make = use_tqdm if callable(use_tqdm) else _tqdm()
        self._bar = make(total=total, desc="Prompts", dynamic_ncols=True, disable=not use_tqdm)
        self._num_in = self._num_out = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, output: RequestOutput) -> None:
        self._num_in += len(output.prompt_token_ids)
        self._num_out += sum(len(sample.token_ids) for sample in output.outputs)
        elapsed = self._bar.format_dict["elapsed"] if not self._bar.disable else 0.0
        if elapsed > 0:
            self._bar.set_postfix_str(f"in {self._num_in / elapsed:.0f} tok/s, out {self._num_out / elapsed:.0f} tok/s", refresh=False)
        self._bar.update(1)
