"""Property tests count steps, not seconds: a busy machine is no fault of the code."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None, max_examples=60)
settings.load_profile("no-deadline")
