"""docs/clients.md is of the clients as they are pinned, and all of them passed."""

from __future__ import annotations

import re

from tests.clients.__main__ import TABLE
from tests.clients.catalog import CLIENTS


def test_the_table_has_every_client_in_its_pinned_version() -> None:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:])}
    assert list(rows) == list(CLIENTS), "`python -m tests.clients` writes the table"
    for name, client in CLIENTS.items():
        _, version, done, result, date = rows[name]
        assert result == "passed" and done and re.fullmatch(r"\d{4}-\d\d-\d\d", date), name
        if client.needs:
            assert client.needs[0].endswith(version.split()[1]), f"{name}: the table is of version {version}, pinned is {client.needs[0]}"
