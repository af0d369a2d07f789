"""How GGUF's `tokenizer.ggml.pre` names split text into words before byte-pair merging.

A GGUF file carries a vocabulary and its merges but only the *name* of the regular expressions that its model's
tokenizer splits with. The expressions belong to the models and are the ones of their published tokenizers; the names
are llama.cpp's. A name that is not in the table is an error: a guess would tokenize almost right, which is worse
than not at all.

Each expression splits every piece that the one before it left; what lies between matches is a piece too.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

from pagoda.base.errors import ModelFileError

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "find_pre_tokenizer"]


class PreTokenizer(NamedTuple):
    """`ignore_merges`: a word that is a token stays whole. `raw`: spaces become U+2581, bytes are not renamed.

    `add_bos`, `add_sep`: what the model expects around a prompt where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    add_sep: bool = False
    raw: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The splitter, byte-level renaming included unless `raw`."""
        patterns = list(self.patterns)
        is_gpt2_last = bool(patterns) and patterns[-1] == _GPT2 and not self.raw
        steps = [_split(pattern) for pattern in (patterns[:-1] if is_gpt2_last else patterns)]
        if not self.raw:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2_last))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The row of the table; ModelFileError naming the known ones where there is none."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise ModelFileError(
            f"the file's pre-tokenizer `{name}` (`tokenizer.ggml.pre`) is not known, and guessing would tokenize "
            f"wrongly; known are {', '.join(sorted(PRE_TOKENIZERS))}"
        ) from None


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == _DIGIT:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(pattern), "isolated")


_DIGIT = r"\p{N}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_MARKS}|{_SPACES}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_MINICPM5 = rf"{_WORDS}|\p{{N}}+|{_MARKS}|{_SPACES}"
_JAIS2 = (
    rf"{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|"
    + "".join(rf"\s{{{size}}}(?!\S)|" for size in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"\s{1,2}(?!\S)|\s{1}"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED_CODER = rf"{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)


def _cased(digits: str, contraction: str, *, but: str = "", marks: str = r"[\r\n/]*") -> str:
    """Words split where lower case turns to upper, as the o200k family does; `but` is taken out of the letters."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    head = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{head}{upper}*{lower}+{contraction}|{head}{upper}+{lower}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+{marks}|{_SPACES}"
    )


_GPT4O = _cased(r"\p{N}{1,3}", _CONTRACTION + "?")
_KIMI = r"[\p{Han}]+|" + _cased(r"\p{N}{1,3}", _CONTRACTION + "?", but=r"&&[^\p{Han}]", marks=r"[\r\n]*")
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
# The letters with case of a 2020 Unicode, as code points because some of them change when text is normalized.
_CASED_LETTERS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a "
    "38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf "
    "1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d "
    "1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 "
    "1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f "
    "2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b a722-a76f "
    "a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 "
    "104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943 "
)


def _char_class(ranges: str) -> str:
    return "".join("-".join(chr(int(end, 16)) for end in item.split("-")) for item in ranges.split())


_DEEPSEEK_LLM_WORD = rf"\s?[{_char_class(_CASED_LETTERS)}]+"
_DEEPSEEK_LLM_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_GPT2_ROW = PreTokenizer((_GPT2,))
_STARCODER_ROW = PreTokenizer((_DIGIT, _GPT2))
_LLAMA3_ROW = PreTokenizer((_LLAMA3,))
_LLAMA_BPE_ROW = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_ROW = PreTokenizer((_QWEN2,))
_GPT4O_ROW = PreTokenizer((_GPT4O,))
_DEEPSEEK3_ROW = PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))
_BAILING_ROW = PreTokenizer((_BAILING,))
_BLOOM_ROW = PreTokenizer((_BLOOM,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        [
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
        ],
        _GPT2_ROW,
    ),
    **dict.fromkeys(("jina-v1-en", "jina-v2-code", "roberta-bpe"), PreTokenizer((_GPT2,), add_sep=True)),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"), _STARCODER_ROW
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        _LLAMA_BPE_ROW,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3_ROW),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2", "kormo", "f2llmv2"),
        _QWEN2_ROW,
    ),
    "qwen35": PreTokenizer((_QWEN35,)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _MINICPM5), ignore_merges=True),
    "jais-2": PreTokenizer((_JAIS2,)),
    "deepseek-llm": PreTokenizer((r"[\r\n]", _DEEPSEEK_LLM_WORD, _DEEPSEEK_LLM_MARKS, r"\s+$", _DEEPSEEK_CJK, r"\p{N}+")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _DIGIT)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3_ROW),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), _BLOOM_ROW),
    "viking": PreTokenizer((_BLOOM, _DIGIT)),
    "tekken": PreTokenizer((_cased(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT4O_ROW),
    "tiny_aya": PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "kimi-k2": PreTokenizer((_KIMI,)),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING_ROW),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    "chameleon": PreTokenizer(
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            _DIGIT,
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    **dict.fromkeys(("gemma4", "granite-embed-multi-311m"), PreTokenizer((r"[^\n]+|[\n]+",), add_bos=True, raw=True)),
}
