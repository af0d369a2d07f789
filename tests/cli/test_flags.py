"""Flags generated from dataclasses: kinds of value, human numbers, --config, and errors that name the nearest match."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.base.config import EngineConfig, ModelConfig, field
from pagoda.base.errors import ConfigError
from pagoda.cli.engine_flags import add_engine_flags, engine_config
from pagoda.cli.flags import ArgumentParser, add_config_flags, apply_config_file, config_from_args, human_int
from pagoda.cli.main import main


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    """Every kind of field."""

    text: str | None = field(None, "a text")
    count: int = field(3, "a number")
    length: int | Literal["auto"] | None = field(None, "a number or auto")
    share: float = field(0.5, "a share of 100%")
    kind: Literal["a", "b"] = field("a", "one of two")
    enable_it: bool = field(True, "yes or no")
    names: Sequence[str] = field((), "several", repeat=True)


def _parse(*words: str) -> _Config:
    parser = ArgumentParser(prog="test")
    parser.add_argument("--config")
    add_config_flags(parser, _Config, title="test")
    apply_config_file(parser, words)
    config = config_from_args(_Config, parser.parse_args(list(words)))
    assert isinstance(config, _Config)
    return config


def test_defaults_are_the_dataclass() -> None:
    assert _parse() == _Config()


def test_every_kind_of_flag() -> None:
    words = ["--text", "t", "--count", "4k", "--length", "auto", "--share", "0.25", "--kind", "b", "--no-enable-it", "--names", "x", "y"]
    assert _parse(*words) == _Config(text="t", count=4000, length="auto", share=0.25, kind="b", enable_it=False, names=["x", "y"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("4k", 4000), ("4K", 4096), ("1.5G", 3 << 29), ("2m", 2_000_000), ("512MiB", 512 << 20), ("1g", 10**9), ("-1", -1), ("1.5k", 1500)],
)
def test_human_numbers(text: str, value: int) -> None:
    assert human_int(text) == value


@given(st.integers(-(10**12), 10**12))
def test_plain_numbers_mean_themselves(number: int) -> None:
    assert human_int(str(number)) == number


@pytest.mark.parametrize("text", ["", "x", "4q", "k", "4 4", "0x10", "1e3", "--3"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number"):
        human_int(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cuont", "3"], "unknown flag `--cuont` (did you mean `--count`?)"),
        (["--count", "many"], "`many` is not a number"),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--cou", "3"], "unknown flag `--cou`"),  # no abbreviations: they would change meaning with every new flag
    ],
)
def test_wrong_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _parse(*words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_config_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("count: 2K\nenable-it: false\nkind: b\nnames: [p, q]\nlength: auto\ntext: from file\n")
    assert _parse("--config", str(file)) == _Config(text="from file", count=2048, length="auto", kind="b", enable_it=False, names=["p", "q"])
    assert _parse(f"--config={file}", "--kind", "a", "--enable-it", "--names", "z").kind == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont: 3", "unknown key `cuont` (did you mean `count`?)"),
        ("count: many", "`count`"),
        ("kind: c", "`kind`"),
        ("enable_it: 1", "must be true or false"),
        ("- count", "must hold `flag: value` lines"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_wrong_config_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        _parse("--config", str(file))
    assert message in str(caught.value)


def test_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        _parse("--config", str(tmp_path / "none.yaml"))


def test_engine_flags_fill_the_engine_config() -> None:
    parser = ArgumentParser(prog="test")
    add_engine_flags(parser)
    assert engine_config(parser.parse_args([])) == EngineConfig()
    assert engine_config(parser.parse_args(["m"])).model == ModelConfig(model="m")
    with pytest.raises(ConfigError, match="given twice"):
        engine_config(parser.parse_args(["m", "--model", "n"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["srve"], "unknown command `srve` (did you mean `serve`?)"),
        (["bench", "latncy"], "unknown command `latncy` (did you mean `latency`?)"),
        (["serve", "--prot", "1"], "pagoda serve: error: unknown flag `--prot` (did you mean `--port`?)"),
        (["bench", "latency", "--input-lne", "1"], "unknown flag `--input-lne` (did you mean `--input-len`?)"),
    ],
)
def test_wrong_usage_of_the_command(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_of_ours_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "text", "--model", str(tmp_path / "none.gguf")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pagoda: error: ") and error.count("\n") == 1


def test_help_shows_defaults_and_percent_signs(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(prog="test")
    add_config_flags(parser, _Config, title="test")
    shown = parser.format_help()
    assert "a number (default: 3)" in shown and "a share of 100%" in shown
