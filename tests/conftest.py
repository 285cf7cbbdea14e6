"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# Machines that run this suite are shared: how long an example takes says nothing of the code. Derandomised,
# so that a red build is red again when it is run again.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
