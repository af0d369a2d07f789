"""One server for all tests that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.serve.fakes import Rig


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    with Rig().make_ready().running() as running:
        yield running


@pytest.fixture(scope="session")
def http(rig: Rig) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=rig.base_url, timeout=10) as client:
        yield client


@pytest.fixture(scope="session")
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=rig.base_url + "/v1", api_key="none", timeout=10, max_retries=0) as made:
        yield made
