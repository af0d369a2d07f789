"""`pagoda fetch [MODEL]`: brings a model into the cache, so that serving it needs no network."""

from __future__ import annotations

import argparse
import sys

from pagoda.base.errors import ModelFileError
from pagoda.files.hub import resolve

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="Hugging Face id; without it the default model")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--hf-token", help="token for gated repositories (default: HF_TOKEN)")
    parser.add_argument("--download-dir", help="where the hub's files are cached")
    parser.add_argument("--if-possible", action="store_true", help="without a network, say so and succeed")


def run(args: argparse.Namespace) -> int:
    try:
        path = resolve(args.model, revision=args.revision, token=args.hf_token, download_dir=args.download_dir)
    except ModelFileError as error:
        if not args.if_possible:
            raise
        print(f"not fetched: {error}", file=sys.stderr)
        return 0
    print(path.path)
    return 0
