"""Runs the clients and writes docs/clients.md: `python -m tests.clients [names]`; rows of clients that were not run stay."""

from __future__ import annotations

import argparse
import datetime
import sys

from pagoda.files.hub import DEFAULT_MODEL, fetch_pinned
from tests.clients.catalog import CLIENTS
from tests.clients.environments import CACHE, ROOT, Unreachable
from tests.clients.session import Outcome, run_client, running_server

TABLE = ROOT / "docs/clients.md"
_HEAD = """# Clients

Each of these is installed in an environment of its own and run, unchanged, against `pagoda serve` with the default model. A client
passes when everything in its row did. `python -m tests.clients [NAME ...]` runs them and writes this table; `make test-long` runs them
too. The scripts, which show how each client is pointed at a server, are in `tests/clients/scripts`.

| client | version | what was run | result | date |
|---|---|---|---|---|
"""


def main() -> int:
    """Status 1 if any client failed or could not be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(CLIENTS)} (default: all)")
    names = parser.parse_args().names or list(CLIENTS)
    if unknown := [name for name in names if name not in CLIENTS]:
        parser.error(f"no client `{unknown[0]}`; there are {', '.join(CLIENTS)}")
    model = fetch_pinned(DEFAULT_MODEL)
    rows = _rows()
    is_good = True
    with running_server(CACHE / "server.log") as server:
        for name in names:
            try:
                outcome = run_client(CLIENTS[name], server, model)
            except Unreachable as error:
                print(f"{name}: not run: {error}", flush=True)
                is_good = False
                continue
            rows[name] = _row(name, outcome)
            print(outcome.output if outcome.failed else rows[name], flush=True)
            is_good = is_good and not outcome.failed
            TABLE.write_text(_HEAD + "".join(rows[known] + "\n" for known in CLIENTS if known in rows), encoding="utf-8")
    return 0 if is_good else 1


def _row(name: str, outcome: Outcome) -> str:
    result = f"failed: {', '.join(outcome.failed)}" if outcome.failed else "passed"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    cells = (name, outcome.version, ", ".join(outcome.done), result, date)
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _rows() -> dict[str, str]:
    """Client -> its row in the table as it stands."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.is_file() else []
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


if __name__ == "__main__":
    sys.exit(main())
