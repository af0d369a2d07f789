"""The clients, each with what its environment needs and the script that is run in it.

A script prints `version NAME VERSION`, then a line `ok WHAT` or `FAILED WHAT` for each thing it did, and ends with status 0 if all went
well. Versions are pinned: a newer one is a change of this table, made when its script passes.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CLIENTS", "Client"]


@dataclass(frozen=True)
class Client:
    """One client of the OpenAI API."""

    name: str
    script: str
    needs: tuple[str, ...] = ()
    """Requirements for pip, or for npm where the script is JavaScript."""
    has_torch: bool = False
    """torch is installed first, by scripts/install_torch.sh, so that no build for GPUs comes in its place."""
    compares: bool = False
    """The script's fifth argument is the URL of a second server: the model in float32 throughout, as transformers computes it."""
    peer: str = ""
    """The environment is that of this peer of benchmarks/peers."""
    timeout_s: float = 300.0

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".mjs")


CLIENTS = {
    client.name: client
    for client in (
        Client("openai-python", "drive_openai.py", ("openai==3.52.0",)),
        Client("openai-node", "drive_openai_node.mjs", ("openai@7.55.0", "zod@4")),
        Client("LiteLLM", "drive_litellm.py", ("litellm==1.106.2", "mcp")),
        Client("LangChain", "drive_langchain.py", ("langchain-openai==1.7.3",)),
        Client("instructor", "drive_instructor.py", ("instructor==1.17.0",)),
        Client("pydantic-ai", "drive_pydantic_ai.py", ("pydantic-ai-slim[openai]==2.68.0",)),
        Client("LlamaIndex", "drive_llama_index.py", ("llama-index-llms-openai-like==0.8.1",)),
        Client("DSPy", "drive_dspy.py", ("dspy==3.4.1",)),
        Client("lm-eval", "drive_lm_eval.py", ("lm-eval[api]==0.4.13", "transformers==5.23.0", "accelerate"), has_torch=True, compares=True),
        Client("guidellm", "drive_guidellm.py", ("guidellm==0.8.1", "torch==2.13.0"), has_torch=True, timeout_s=600),
        Client("aiperf", "drive_aiperf.py", ("aiperf==0.13.0",), timeout_s=600),
        Client("vllm bench serve", "drive_vllm_bench.py", peer="vllm", timeout_s=600),
    )
}
