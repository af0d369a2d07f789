"""Chat templates: the same text as transformers renders, and errors that belong to the request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pagoda.base.errors import ConfigError, InvalidRequest, ModelFileError
from pagoda.text.template import ChatTemplate, load_chat_template
from pagoda.text.tokenizer import Tokenizer
from tests.text.test_detokenize import byte_level_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer", "description": "an x"}}, "required": ["x"]}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d<\u00e9", "parameters": PARAMETERS}}]


def call(number: int, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "f", "arguments": arguments}}


def result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call0000{number}", "name": "f"}


ASKED = {"role": "user", "content": "Hi <b>&'\" \u00e9"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [ASKED],
    "system": [{"role": "system", "content": "Be brief."}, ASKED],
    "multi-turn": [
        {"role": "system", "content": "Be brief."}, ASKED, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": " Why? "},
    ],
    "call": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call(1, x=1)]}, result(1, "42")],
    "parallel calls": [
        ASKED, {"role": "assistant", "content": "I look.", "tool_calls": [call(1, x=1), call(2, x=2, y="a")]}, result(1, "42"),
        result(2, '{"k": 1}'), {"role": "assistant", "content": "Both."}, {"role": "user", "content": "Thanks"},
    ],
    "continued": [ASKED, {"role": "assistant", "content": "The answer is"}],
}  # fmt: skip


def test_equals_transformers(shared_data: Path) -> None:
    """Every template, conversation, with and without tools: the text of `apply_chat_template`, or both refuse."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    counts: Counter[tuple[str, str]] = Counter()
    for path in sorted((shared_data / "templates" / "llama.cpp").glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        ours = ChatTemplate({"default": source}, TOKENS)
        for name, messages in CONVERSATIONS.items():
            continues = name == "continued"
            options = {"add_generation_prompt": not continues, "continue_final_message": continues}
            for tools in (None, TOOLS):
                try:
                    (expected,), _ = utils.render_jinja_template(
                        conversations=[messages], tools=tools, documents=None, chat_template=source, **options, **TOKENS
                    )
                except Exception:  # whatever a template meets
                    with pytest.raises(InvalidRequest):
                        ours.render(messages, tools=tools, **options)
                    counts[name, "refused"] += 1
                else:
                    assert ours.render(messages, tools=tools, **options) == expected, f"{path.name}: {name}"
                    counts[name, "equal"] += 1
    for name in CONVERSATIONS:
        assert counts[name, "equal"] > 110 and counts[name, "refused"] < 30, counts


def template(source: str, **others: str) -> ChatTemplate:
    return ChatTemplate({"default": source, **others}, TOKENS)


USER = [{"role": "user", "content": "x"}]
SIMPLE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
SIMPLE += "{% if add_generation_prompt %}[assistant]{% endif %}"
LOOPING = "{% for m in messages %}{% for part in m['content'] %}<{{ part.type }}:{{ part.text }}>{% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% set c = m.content %}{% if c is string %}{{ c }}"
    "{% else %}{% for p in c %}({{ p.text }}){% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "text", "parts"), [(SIMPLE, None, None), (LOOPING, "<text:a>", "<text:a><text:b>"), (EITHER, "a", "(a)(b)")]
)
def test_content_as_text_or_parts(source: str, text: str | None, parts: str | None) -> None:
    chat = template(source)
    whole = chat.render([{"role": "user", "content": "a"}], add_generation_prompt=False)
    split = chat.render(
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], add_generation_prompt=False
    )
    assert whole == (text or "<s>[user]a</s>")
    assert split == (parts or "<s>[user]a\nb</s>")


@pytest.mark.parametrize("content", ["ab  ", "</s>", [{"type": "text", "text": "ab  "}]])
def test_continue_final_message(content: Any) -> None:
    shown = content if isinstance(content, str) else content[0]["text"]
    messages = [*USER, {"role": "assistant", "content": content}]
    prompt = template(SIMPLE).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt == f"<s>[user]x</s>[assistant]{shown}"
    with pytest.raises(InvalidRequest, match="exclude each other"):
        template(SIMPLE).render(messages, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="does not show"):
        template("{{ messages[0].content }}").render(messages, add_generation_prompt=False, continue_final_message=True)


def test_the_environment_of_templates() -> None:
    def render(source: str, **kwargs: Any) -> str:
        return template(source).render(USER, **kwargs)

    assert render("{{ {'a': '<\u00e9>'} | tojson }}") == '{"a": "<\u00e9>"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}") == '{"a":2,"b":1}'
    assert render("  {% if true %}\nyes\n  {% endif %}\n") == "yes\n"
    assert render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}said{% endgeneration %}") == "said"
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert render("{{ documents[0].text }}", documents=[{"text": "d"}]) == "d"


def test_templates_for_tools() -> None:
    chat = template("plain", tool_use="with tools")
    assert chat.render(USER) == "plain"
    assert chat.render(USER, tools=TOOLS) == "with tools"
    with pytest.raises(InvalidRequest, match="--chat-template"):
        ChatTemplate({"rag": "x"}, {}).render(USER)


def test_arguments_of_calls_become_objects() -> None:
    source = "{{ messages[0].tool_calls[0].function.arguments.x }}{{ messages[0].content }}"
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 5}'}}
    assert template(source).render([{"role": "assistant", "content": None, "tool_calls": [call]}]) == "5"
    call["function"] = {"name": "f", "arguments": "{"}
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        template(source).render([{"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(
    ("source", "messages", "kwargs", "message"),
    [
        (SIMPLE, [], {}, "must not be empty"),
        (SIMPLE, [{"content": "x"}], {}, "with a `role`"),
        (SIMPLE, ["x"], {}, "with a `role`"),
        (SIMPLE, [{"role": "user", "content": 5}], {}, "string or a list"),
        (SIMPLE, [{"role": "user", "content": [{"type": "image_url"}]}], {}, "`image_url` is not supported"),
        (SIMPLE, [{"role": "user", "content": [{"type": "text"}]}], {}, "`type` and `text`"),
        (SIMPLE, USER, {"chat_template": "x"}, "`chat_template` cannot be set"),
        ("{{ raise_exception('roles must alternate') }}", USER, {}, "roles must alternate"),
        ("{{ nothing.at_all }}", USER, {}, "undefined"),
        ("{{ messages.append(1) }}", USER, {}, "refuses"),
        ("{{ ''.__class__.__mro__ }}", USER, {}, "unsafe"),
        ("{{ 1 // 0 }}", USER, {}, "refuses"),
        ("{{ 'x' * 10 ** 9 }}", USER, {}, "too large"),
        ("{{ [1] * 99999999 }}", USER, {}, "too large"),
        ("{{ 10 ** 10 ** 10 }}", USER, {}, "too large"),
    ],
)
def test_errors_belong_to_the_request(source: str, messages: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        template(source).render(messages, **kwargs)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_has_a_time_limit() -> None:
    """It ends in the thread it runs in; others, and the thread itself afterwards, are undisturbed."""
    endless, quick = ChatTemplate({"default": ENDLESS}, {}, seconds=0.2), ChatTemplate({"default": "ok"}, {}, seconds=0.2)
    started = time.monotonic()
    errors: list[str] = []

    def work() -> None:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match=r"longer than 0\.2 s") as caught:
                endless.render(USER)
            errors.append(caught.value.message)
            assert [quick.render(USER) for _ in range(1000)] == ["ok"] * 1000

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 6 and time.monotonic() - started < 20


def test_syntax_errors_are_found_at_start() -> None:
    with pytest.raises(ModelFileError, match="line 2 of the chat template `default`"):
        template("ok\n{% if %}")


def test_loading(tmp_path: Path, default_tokenizer: Tokenizer) -> None:
    chat = load_chat_template(default_tokenizer)
    assert chat is not None
    assert chat.render([{"role": "user", "content": "Hi"}]).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    (tmp_path / "t.jinja").write_text("from a file")
    for override, expected in [(str(tmp_path / "t.jinja"), "from a file"), ("{{ messages[0].content }}", "x")]:
        chat = load_chat_template(default_tokenizer, override)
        assert chat is not None and chat.render(USER) == expected
    with pytest.raises(ConfigError, match="neither a template nor a readable file"):
        load_chat_template(default_tokenizer, str(tmp_path / "absent"))
    assert load_chat_template(byte_level_tokenizer()) is None
