"""What holds for all tests."""

import signal

# Shells start background jobs with SIGINT ignored, and processes inherit that. Tests that interrupt
# themselves or a child need it as a terminal leaves it.
signal.signal(signal.SIGINT, signal.default_int_handler)
