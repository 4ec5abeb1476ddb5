"""What holds for every test."""

from __future__ import annotations

import signal

# A shell starts background jobs with SIGINT ignored, and processes of the tests would inherit that: Ctrl-C is tested too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
