"""`python -m pagoda.cli`: the `pagoda` command where it is not on the path."""

from __future__ import annotations

import sys

from pagoda.cli.main import main

sys.exit(main())
