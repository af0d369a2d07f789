"""lm-eval: its two routes for such a server, on tasks with items of their own, and log-likelihoods beside those of transformers.

The reference is lm-eval's own `hf` model on the default model's weights, dequantized to float32. The fifth argument is a server of that
same folder in float32 throughout: its sums are those of transformers to EXACT of a nat per token. The default server keeps keys and
values in 16 bits and multiplies quantized weights: CLOSE per token (transformers in bfloat16 is 0.27 away).
"""

from __future__ import annotations

import json
import sys

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from steps import FOLDER, MODEL, URL, WORK, run, step

EXACT, CLOSE = 0.001, 0.1
ITEMS = [
    ("The capital of France is", [" Paris", " Berlin", " a small red fish"], 0),
    ("Water boils at one hundred degrees", [" Celsius", " of separation", " yesterday"], 0),
    ("The sun rises in the", [" west", " east", " kitchen sink"], 1),
    ("Two plus two equals", [" four", " seven", " blue"], 0),
    ("Caf\u00e9 au lait is coffee with", [" milk", " \u65e5\u672c\u8a9e", " sand"], 0),
    ("Once upon a time there was a little girl who lived in a", [" house near the forest.", " numerically stable loop.", " shoe."], 0),
    ("def add(a, b):\n    return", [" a + b", " a - b\n\n", " None"], 0),
    ("She opened the door, looked at the rain, and took her", [" umbrella", " umbrellas with logarithms", " time"], 0),
]
COMMON = {"model": MODEL, "tokenizer": str(FOLDER), "tokenizer_backend": "huggingface", "max_length": 2048}


def write_tasks() -> TaskManager:
    """Two tasks in YAML, as a user would write them, over a file of items."""
    folder = WORK / "tasks"
    folder.mkdir(exist_ok=True)
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps({"text": t, "choices": c, "gold": g}) + "\n" for t, c, g in ITEMS), encoding="utf-8")
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    choice = "output_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: gold\ntarget_delimiter: ''\n"
    (folder / "choose.yaml").write_text(f"task: local_choose\n{common}{choice}", encoding="utf-8")
    says = "output_type: generate_until\ndoc_to_text: text\ndoc_to_target: '{{choices[gold]}}'\n"
    ends = "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n"
    (folder / "say.yaml").write_text(f"task: local_say\n{common}{says}{ends}", encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def requests() -> list[Instance]:
    pairs = [(text, choice) for text, choices, _ in ITEMS for choice in choices]
    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


def compare(url: str, tolerance: float) -> int:
    """Sums of the `hf` model and of a server on every item; the number of those whose greedy verdicts differ."""
    reference = get_model("hf")(pretrained=str(FOLDER), device="cpu", dtype="float32", batch_size=4)
    asked = get_model("local-completions")(base_url=f"{url}/completions", num_concurrent=4, max_retries=1, **COMMON)
    expected, found = reference.loglikelihood(requests()), asked.loglikelihood(requests())
    distances = []
    for instance, (sum_expected, _), (sum_found, _) in zip(requests(), expected, found, strict=True):
        distances.append(abs(sum_expected - sum_found) / len(reference.tok_encode(instance.args[1])))
        assert distances[-1] <= tolerance, (instance.args, sum_expected, sum_found)
    print(f"{len(found)} sums, from those of transformers at most {max(distances):.6f} nat per token away", flush=True)
    return sum(one[1] != other[1] for one, other in zip(expected, found, strict=True))


@step
def loglikelihoods_equal_those_of_transformers_in_float32() -> None:
    assert compare(f"{sys.argv[5]}/v1", EXACT) == 0


@step
def loglikelihoods_of_the_default_model_are_near_them() -> None:
    compare(URL, CLOSE)


@step
def local_completions() -> None:
    arguments = {**COMMON, "base_url": f"{URL}/completions", "num_concurrent": 4, "batch_size": 2}
    results = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=["local_choose", "local_say"], task_manager=write_tasks())
    assert results["results"]["local_choose"]["acc,none"] >= 0.5
    assert all(sample["resps"][0][0] for sample in results["samples"]["local_say"])


@step
def local_completions_with_text_prompts() -> None:
    arguments = {**COMMON, "base_url": f"{URL}/completions", "tokenized_requests": False}
    results = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=["local_say"], task_manager=write_tasks())
    assert all(sample["resps"][0][0] for sample in results["samples"]["local_say"])


@step
def local_chat_completions() -> None:
    arguments = {"model": MODEL, "base_url": f"{URL}/chat/completions", "num_concurrent": 4}
    results = lm_eval.simple_evaluate(
        model="local-chat-completions", model_args=arguments, tasks=["local_say"], task_manager=write_tasks(), apply_chat_template=True
    )
    assert all(sample["resps"][0][0] for sample in results["samples"]["local_say"])


run("lm_eval")
