"""Each client's script passes in its own environment, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.catalog import CLIENTS
from tests.clients.environments import CACHE, Unreachable
from tests.clients.session import run_client, running_server

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]  # the first run installs them


@pytest.fixture(scope="module")
def server(default_model: Path) -> Iterator[str]:
    with running_server(CACHE / "server.log") as url:
        yield url


@pytest.mark.parametrize("name", CLIENTS)
def test_client(name: str, server: str, default_model: Path) -> None:
    try:
        outcome = run_client(CLIENTS[name], server, default_model)
    except Unreachable as error:
        pytest.skip(str(error))
    assert not outcome.failed, outcome.output
