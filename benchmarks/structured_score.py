"""How much of JSON Schema is enforced, on a file of schemas with valid and invalid instances.

    python benchmarks/structured_score.py ../shared/data/schemas/jsonschemabench_sample.jsonl [--show]

Each line of the file: {"id", "group", "schema", "tests": [{"valid", "data"}]}. Per group: schemas compiled, valid instances accepted, invalid
ones refused. An instance is fed byte by byte to the grammar that a request with this schema would get. Generated objects have
their properties in the schema's order, so an instance that is refused as written is tried once more in that order.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pagoda.base.errors import InvalidRequest
from pagoda.base.types import StructuredOutputsParams
from pagoda.structured.matcher import GrammarCompiler, Matcher
from pagoda.structured.translate import translate

END = 256


class Bytes:
    """A vocabulary of the 256 bytes and an end token."""

    vocab_size = 257
    special_ids = frozenset([END])
    bos_id = None

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < END else b"<end>"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


@dataclass
class Score:
    schemas: int = 0
    compiled: int = 0
    valid: int = 0
    accepted: int = 0
    invalid: int = 0
    refused: int = 0
    relaxed: int = 0  # schemas compiled with something left out
    seconds: list[float] = field(default_factory=list)

    def line(self, name: str) -> str:
        cells = [(self.compiled, self.schemas), (self.accepted, self.valid), (self.refused, self.invalid)]
        shown = [f"{a:5}/{b:<5}{f'{100 * a / b:6.1f} %' if b else '      -'}" for a, b in cells]
        return f"{name:<18}{'  '.join(f'{cell:<20}' for cell in shown)}{self.relaxed:6}"


def subschemas(schema: Any, root: Any, value: Any, seen: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    """(property name, schema) in the order of the schema; "*" for other properties and items. Alternatives that require what
    `value` has not are none of its own."""
    if not isinstance(schema, dict):
        return
    ref = schema.get("$ref")
    if isinstance(ref, str) and ref.startswith("#/") and ref not in seen:
        node = root
        for part in ref[2:].split("/"):
            node = node.get(part, {}) if isinstance(node, dict) else {}
        yield from subschemas(node, root, value, seen | {ref})
    for key, part in schema.items():
        if key == "properties":
            yield from part.items()
        elif key in ("allOf", "anyOf", "oneOf"):
            for item in part:
                required = item.get("required", ()) if isinstance(item, dict) and key != "allOf" else ()
                if not isinstance(value, dict) or all(name in value for name in required):
                    yield from subschemas(item, root, value, seen)
        elif key in ("items", "additionalProperties"):
            yield "*", part
        elif key == "patternProperties":
            yield from (("*", item) for item in part.values())


def in_order(value: Any, schemas: list[Any], root: Any) -> Any:
    found = [pair for schema in schemas for pair in subschemas(schema, root, value)]
    others = [schema for name, schema in found if name == "*"]
    if isinstance(value, list):
        return [in_order(item, others, root) for item in value]
    if not isinstance(value, dict):
        return value
    rank: dict[str, int] = {}
    for name, _ in found:
        rank.setdefault(name, len(rank))
    names = sorted(value, key=lambda name: rank.get(name, len(rank)))
    return {name: in_order(value[name], [s for n, s in found if n == name] or others, root) for name in names}


def accepts(matcher: Matcher, value: Any) -> bool:
    matcher = matcher.copy()
    text = json.dumps(value, ensure_ascii=False).encode()
    return all(matcher.accept(byte) is None for byte in text) and matcher.accept(END) is None


def judge(entry: dict[str, Any], compiler: GrammarCompiler, score: Score) -> list[str]:
    """Counts one schema; returns what went wrong."""
    wrong: list[str] = []
    schema = entry["schema"]
    score.schemas += 1
    started = time.perf_counter()
    try:
        translated = translate(StructuredOutputsParams(json=schema))
        matcher = compiler.compile(translated.grammar, [END])
    except InvalidRequest as error:
        return [f"{entry['id']}: {error.message}"]
    score.seconds.append(time.perf_counter() - started)
    score.compiled += 1
    score.relaxed += bool(translated.notes)
    for test in entry["tests"]:
        is_accepted = accepts(matcher, test["data"]) or accepts(matcher, in_order(test["data"], [schema], schema))
        if test["valid"]:
            score.valid += 1
            score.accepted += is_accepted
        else:
            score.invalid += 1
            score.refused += not is_accepted
        if is_accepted != test["valid"]:
            wrong.append(f"{entry['id']}: {'accepts' if is_accepted else 'refuses'} {json.dumps(test['data'])[:200]} {translated.notes}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--show", action="store_true", help="print what went wrong")
    args = parser.parse_args()
    compiler, groups, total, wrong = GrammarCompiler(Bytes, END + 1), defaultdict[str, Score](Score), Score(), []
    with open(args.file, encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            wrong += judge(entry, compiler, groups[entry["group"]])
    for score in groups.values():
        for name in ("schemas", "compiled", "valid", "accepted", "invalid", "refused", "relaxed", "seconds"):
            setattr(total, name, getattr(total, name) + getattr(score, name))
    print(f"{'group':<18}{'compiled':<22}{'valid accepted':<22}{'invalid refused':<20}relaxed")
    for name in sorted(groups):
        print(groups[name].line(name))
    print(total.line("all"))
    seconds = sorted(total.seconds)
    print(f"compile time: median {1e3 * seconds[len(seconds) // 2]:.1f} ms, longest {1e3 * seconds[-1]:.0f} ms")
    if args.show:
        print("\n".join(wrong))


if __name__ == "__main__":
    main()
