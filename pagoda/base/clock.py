"""Time as an argument: whoever needs it takes a `Clock`, so that tests and trace replay can drive it."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Clock", "monotonic"]

Clock = Callable[[], float]
"""Seconds from an arbitrary origin, never going back."""

monotonic: Clock = time.monotonic
