"""Offline generation."""

from __future__ import annotations

import io
from typing import Any

import pytest

from pagoda import LLM, SamplingParams
from pagoda.base.config import config_from_kwargs
from pagoda.base.errors import ConfigError, InvalidRequest
from pagoda.base.hardware import read_hardware
from pagoda.base.resolve import resolve
from tests.api.fakes import FakeEngine


def make(**kwargs: Any) -> tuple[LLM, FakeEngine]:
    engine = FakeEngine(**kwargs)
    return LLM(engine=engine), engine


QUIET: dict[str, Any] = {"use_tqdm": False}


def test_prompts_in_every_shape_answer_in_order() -> None:
    llm, engine = make()
    params = SamplingParams(seed=3, max_tokens=None)
    ids = llm.get_tokenizer().encode("cd")
    assert [o.outputs[0].text for o in llm.generate("ab", params, **QUIET)] == ["AB 3"]
    assert [o.outputs[0].text for o in llm.generate(ids, params, **QUIET)] == ["CD 3"]
    outputs = llm.generate(["ab", ids, {"prompt": "e"}], [params, params.clone(seed=4), params], **QUIET)
    assert [o.outputs[0].text for o in outputs] == ["AB 3", "CD 4", "E 3"]
    assert [o.prompt for o in outputs] == ["ab", None, "e"]
    assert all(o.finished and o.outputs[0].finish_reason == "stop" for o in outputs)
    assert llm.generate([], params, **QUIET) == []
    engine.check_whole()


def test_more_prompts_than_slots() -> None:
    llm, engine = make(max_num_seqs=2)
    outputs = llm.generate([f"p{i}" for i in range(9)], SamplingParams(seed=1, max_tokens=None), **QUIET)
    assert [o.outputs[0].text for o in outputs] == [f"P{i} 1" for i in range(9)]
    engine.check_whole()


def test_request_output_fields() -> None:
    llm, _ = make()
    (out,) = llm.generate("ab", SamplingParams(seed=1, max_tokens=3, logprobs=1, prompt_logprobs=1), **QUIET)
    sample = out.outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("AB ", "length", None)
    assert len(sample.token_ids) == 3 and len(sample.logprobs) == 3
    assert sample.cumulative_logprob == pytest.approx(-1.5)
    assert [table[i].decoded_token for table, i in zip(sample.logprobs, sample.token_ids)] == ["A", "B", " "]
    assert out.prompt_logprobs[0] is None and out.prompt_logprobs[1][out.prompt_token_ids[1]].logprob == -0.5
    assert out.metrics is not None and out.metrics.first_token_time > 0
    (plain,) = llm.generate("ab", SamplingParams(max_tokens=3), **QUIET)
    assert plain.outputs[0].logprobs is None and plain.outputs[0].cumulative_logprob is None


def test_samples_are_gathered_and_a_stop_string_ends_one_of_them() -> None:
    llm, engine = make(script=lambda prompt, seed: f"{'x' * seed}STOP{'y' * 50}" if seed < 3 else "z" * 20)
    (out,) = llm.generate("ab", SamplingParams(seed=1, n=3, stop=["STOP"], max_tokens=40), **QUIET)
    assert [s.text for s in out.outputs] == ["x", "xx", "z" * 20]
    assert [(s.finish_reason, s.stop_reason) for s in out.outputs] == [("stop", "STOP"), ("stop", "STOP"), ("stop", None)]
    assert [len(s.token_ids) for s in out.outputs[:2]] == [5, 6], "tokens up to the end of the stop string"
    engine.check_whole()
    assert engine.core.stats().request_success == {"stop": 3}
    (kept,) = llm.generate("ab", SamplingParams(seed=1, stop="STOP", include_stop_str_in_output=True, max_tokens=40), **QUIET)
    assert kept.outputs[0].text == "xSTOP"


def test_defaults_come_from_the_model() -> None:
    llm, _ = make(generation_config={"max_new_tokens": 2})
    assert llm.get_default_sampling_params().max_tokens == 2
    assert len(llm.generate("abcdef", **QUIET)[0].outputs[0].token_ids) == 2


def test_chat_renders_the_template() -> None:
    llm, _ = make(script=lambda prompt, seed: prompt)
    params = SamplingParams(max_tokens=None)
    hello = [{"role": "user", "content": "hi"}]
    assert llm.chat(hello, params, **QUIET)[0].outputs[0].text == "<user>hi<assistant>"
    two = llm.chat([hello, [{"role": "user", "content": "ho"}]], params, **QUIET)
    assert [o.prompt for o in two] == ["<user>hi<assistant>", "<user>ho<assistant>"]
    assert llm.chat(hello, params, tools=[{}, {}], chat_template_kwargs={"mood": "!"}, **QUIET)[0].prompt == "<user>hi[2 tools]<assistant>!"
    assert llm.chat(hello, params, chat_template="{{ messages[0].content }}", **QUIET)[0].prompt == "hi"
    going_on = [*hello, {"role": "assistant", "content": "well"}]
    out = llm.chat(going_on, params, add_generation_prompt=False, continue_final_message=True, **QUIET)
    assert out[0].prompt == "<user>hi<assistant>well"


def test_a_model_without_template_says_so() -> None:
    engine = FakeEngine()
    engine.front.template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        LLM(engine=engine).chat([{"role": "user", "content": "hi"}], **QUIET)


def test_a_bad_request_is_refused_before_anything_runs() -> None:
    llm, engine = make()
    with pytest.raises(InvalidRequest):
        llm.generate(["ok", "a" * 300], SamplingParams(), **QUIET)
    with pytest.raises(InvalidRequest, match="priority"):  # only the core knows the policy
        llm.generate(["ok", "fine"], SamplingParams(), priority=[0, 1], **QUIET)
    with pytest.raises(InvalidRequest, match="2 prompts and 1"):
        llm.generate(["ok", "fine"], [SamplingParams()], **QUIET)
    engine.check_whole()
    assert llm.generate("ok", SamplingParams(seed=1, max_tokens=None), **QUIET)[0].outputs[0].text == "OK 1"


def test_a_failing_request_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    llm, engine = make()
    engine.executor.row_errors.add("bad")
    outputs = llm.generate(["good", "bad"], SamplingParams(seed=1, max_tokens=None), **QUIET)
    assert [o.outputs[0].finish_reason for o in outputs] == ["stop", "error"]
    assert outputs[0].error is None and outputs[1].error == "non-finite logits"
    engine.check_whole()


def test_an_interrupt_leaves_nothing_behind() -> None:
    llm, engine = make()
    engine.executor.bug = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(), **QUIET)
    engine.check_whole()
    assert llm.generate("c", SamplingParams(seed=1, max_tokens=None), **QUIET)[0].outputs[0].text == "C 1"


def test_progress_bar_counts_prompts_and_tokens() -> None:
    llm, _ = make()
    shown = io.StringIO()

    def bar(**kwargs: Any) -> Any:
        from tqdm import tqdm

        return tqdm(file=shown, mininterval=0, **kwargs)

    llm.generate(["ab", "cd"], SamplingParams(seed=1, max_tokens=None), use_tqdm=bar)
    assert "2/2" in shown.getvalue() and "tok/s" in shown.getvalue()


@pytest.mark.parametrize(("dtype", "said"), [("fp8_e4m3", "int8 has as few bytes"), ("int4", "not one of auto, float32, bfloat16, int8")])
def test_cache_types_a_cpu_has_not_are_refused(dtype: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(config_from_kwargs(kv_cache_dtype=dtype), read_hardware(), make()[1].facts)


def test_unknown_arguments_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(max_model_length=5)
