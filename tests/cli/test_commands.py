"""Commands end to end, in this process, on the smallest real model there is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagoda.cli.main import main

SMALL = ["--max-model-len", "256", "--kv-cache-memory-bytes", "8M", "--max-num-seqs", "16"]


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> str:
    return str(shared_data / "weights/stories260K-hf")


@pytest.fixture(scope="session")
def golden(shared_data: Path) -> dict[str, Any]:
    """Greedy answer of transformers in float32."""
    items = json.loads((shared_data / "reference/stories260k_fp32_greedy.json").read_text())["items"]
    found: dict[str, Any] = next(item for item in items if item["kind"] == "raw")
    return found


def test_complete_answers_as_transformers(stories: str, golden: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["complete", golden["prompt"], "--model", stories, "--dtype", "float32", "--temperature", "0", "--max-tokens", "48", *SMALL]
    assert main(words) == 0
    said = capsys.readouterr().out.rstrip("\n")
    assert len(said) > 50 and golden["text"].startswith(said)


def test_complete_reads_stdin(stories: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time"))
    assert main(["complete", "--model", stories, "--temperature", "0", "--max-tokens", "8", *SMALL]) == 0
    assert capsys.readouterr().out.startswith(", there was a")


def test_chat_in_one_shot_and_line_by_line(stories: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["chat", stories, "--temperature", "0", "--max-tokens", "12", *SMALL]
    assert main([*words, "-q", "Once upon a time"]) == 0
    once = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n/reset\nOnce upon a time\n/exit\n"))
    assert main(words) == 0
    assert once.strip() and capsys.readouterr().out == f"{once}(forgotten)\n{once}"


def test_chat_refusal_is_one_line(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", stories, "-q", "word " * 400, *SMALL]) == 1
    assert "maximum context length is 256" in capsys.readouterr().err


def _run(stories: str, tmp_path: Path, *lines: object) -> list[dict[str, Any]]:
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n")
    assert main(["run", "-i", str(asked), "-o", str(answered), stories, *SMALL]) == 0
    return [json.loads(line) for line in answered.read_text().splitlines()]


def _completion(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"temperature": 0, "max_tokens": 8, **body}}


def test_run_answers_in_the_servers_words(stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions"}
    chat["body"] = {"messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0, "max_tokens": 8}  # type: ignore[assignment]
    many = [_completion(f"c{i}", prompt="Once upon a time") for i in range(40)]
    results = _run(stories, tmp_path, chat, *many, _completion("two", prompt=["Once upon", "One day"], n=1, logprobs=1))
    by_id = {result["custom_id"]: result for result in results}
    assert len(results) == len(by_id) == 42 and all(result["error"] is None for result in results)
    bodies = {name: result["response"]["body"] for name, result in by_id.items()}
    assert {result["response"]["status_code"] for result in results} == {200}
    assert bodies["chat"]["object"] == "chat.completion" and bodies["chat"]["usage"]["completion_tokens"] == 8
    assert {bodies[f"c{i}"]["choices"][0]["text"] for i in range(40)} == {bodies["c0"]["choices"][0]["text"]}
    assert [choice["index"] for choice in bodies["two"]["choices"]] == [0, 1]
    assert len(bodies["two"]["choices"][0]["logprobs"]["tokens"]) == 8
    assert len({result["id"] for result in results}) == len({result["response"]["request_id"] for result in results}) == 42
    assert "42 answered, 0 refused or failed, of 42 requests" in capsys.readouterr().err


def test_run_goes_on_after_bad_lines(stories: str, tmp_path: Path) -> None:
    good = _completion("good", prompt="Once upon a time")
    lines: list[object] = [
        "not json",
        '{"custom_id": "cut", ',
        [1, 2],
        {"custom_id": "bare"},
        {**good, "custom_id": "get", "method": "GET"},
        {**good, "custom_id": "elsewhere", "url": "/v1/embeddings"},
        {**good, "custom_id": 7},
        _completion("hot", prompt="x", temperature=9),
        _completion("typed", prompt="x", max_tokens="many"),
        _completion("stream", prompt="x", stream=True),
        _completion("other", prompt="x", model="other"),
        _completion("long", prompt="word " * 400),
        good,
    ]
    results = _run(stories, tmp_path, *lines)
    assert len(results) == len(lines)
    refused = {result["custom_id"]: result["error"]["code"] for result in results if result["error"] and result["custom_id"]}
    assert refused == {"bare": "invalid_line", "get": "invalid_method", "elsewhere": "invalid_url"}
    assert all(result["response"] is None for result in results if result["error"])
    assert sum(result["custom_id"] is None for result in results) == 4
    answered = {result["custom_id"]: result["response"]["status_code"] for result in results if result["response"]}
    assert answered == {"hot": 400, "typed": 400, "stream": 400, "other": 404, "long": 400, "good": 200}
    params = {result["custom_id"]: result["response"]["body"]["error"]["param"] for result in results if result["response"] and "error" in result["response"]["body"]}
    assert params == {"hot": "temperature", "typed": "max_tokens", "stream": "stream", "other": "model", "long": "prompt"}


def test_run_from_stdin_to_stdout(stories: str) -> None:
    line = json.dumps(_completion("a", prompt="Once upon a time"))
    words = [sys.executable, "-m", "pagoda.cli", "run", "-i", "-", "-o", "-", stories, *SMALL]
    done = subprocess.run(words, input=line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["custom_id"] == "a"


def test_run_with_files_that_cannot_be(stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-i", str(tmp_path / "none"), "-o", str(tmp_path / "out"), stories]) == 1
    assert "--input-file" in capsys.readouterr().err
    (tmp_path / "in").write_text("")
    assert main(["run", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "no/out"), stories]) == 1
    assert "--output-file" in capsys.readouterr().err


def test_doctor_says_what_would_run(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", stories, *SMALL]) == 0
    shown = capsys.readouterr().out
    for part in ("CPU:", "Memory:", "Kernels:", "would run", "Chosen automatically:", "num_threads", "forward", "KV cache", "LlamaForCausalLM"):
        assert part in shown, part


def test_doctor_says_what_would_not_run(stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((Path(stories) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalML"]}))
    assert main(["doctor", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "CPU:" in shown and "would NOT run" in shown and "did you mean `LlamaForCausalLM`?" in shown


def test_output_that_nobody_reads_is_no_traceback(stories: str) -> None:
    """`pagoda complete ... | head -c 1` ends quietly."""
    words = [sys.executable, "-m", "pagoda.cli", "complete", "Once upon a time", "--model", stories, "--temperature", "0", "--max-tokens", "100", *SMALL]
    read, write = os.pipe()
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, text=True) as process:
        os.close(write)
        os.read(read, 1)
        os.close(read)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ""
