"""OpenVINO GenAI's continuous batching pipeline in this process, up to 64 sequences, prefix caching on."""

from __future__ import annotations

import argparse

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.workers.wire import Generated, Requests, serve

_BLOCK_NBYTES = 23040  # of one token: 30 layers x 3 heads x 64 values x 2 x 2 bytes


class OpenVino:
    def __init__(self, args: argparse.Namespace) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(args.kv_tokens * _BLOCK_NBYTES / 2**30))
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = args.options.pop("prefix", True)
        self._folder, self._properties = args.model, {"INFERENCE_NUM_THREADS": args.threads, **args.options}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", self._properties)
        self._plain: openvino.InferRequest | None = None

    def generate(self, requests: Requests, *, ignore_eos: bool = True) -> Generated:
        prompts = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt, _ in requests]
        found = self._pipeline.generate(prompts, [self._config(wanted, ignore_eos) for _, wanted in requests])
        return Generated([result.m_generation_ids[0] for result in found])

    def logits(self, chunk: list[int]) -> np.ndarray:
        """Of the same file and plugin outside the pipeline, which gives none."""
        if self._plain is None:
            self._plain = openvino.Core().compile_model(f"{self._folder}/openvino_model.xml", "CPU", self._properties).create_infer_request()
        self._plain.reset_state()
        row = np.array([chunk], dtype=np.int64)
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(chunk))[None], "beam_idx": np.zeros(1, np.int32)}
        self._plain.infer(inputs)
        return np.array(self._plain.get_tensor("logits").data[0, :-1], dtype=np.float32)

    def _config(self, wanted: int, ignore_eos: bool) -> openvino_genai.GenerationConfig:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = wanted, False, ignore_eos
        config.apply_chat_template = False
        config.eos_token_id = 2
        if ignore_eos:
            config.min_new_tokens = wanted
        return config


if __name__ == "__main__":
    serve(OpenVino)
