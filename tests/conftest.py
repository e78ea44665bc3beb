"""Hypothesis profiles for the whole suite; and Ctrl-C, which some tests press.

The environment variable HYPOTHESIS_PROFILE chooses one. Without it, `ci` is taken where the
variable CI is set, and `default` elsewhere.

* `default`: 100 examples a test, drawn anew each time.
* `brief`: 100 examples, the same in every run: what `.ci/run` takes, which has to be done in time.
* `few`: 25 of them: with the oldest NumPy there, whose tests are the slower for their coverage.
* `ci`: 1,000 examples, the same in every run, so that a red build can be repeated.
* `nightly`: 10,000 examples, drawn anew.

No profile has a deadline: how long an example takes says something about the machine only.

A shell without job control has what it runs in the background ignore Ctrl-C, and so would all that
a test starts.
"""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

_BASE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("default", parent=_BASE, max_examples=100)
settings.register_profile("brief", parent=_BASE, max_examples=100, derandomize=True)
settings.register_profile("few", parent=_BASE, max_examples=25, derandomize=True)
settings.register_profile("ci", parent=_BASE, max_examples=1_000, derandomize=True)
settings.register_profile("nightly", parent=_BASE, max_examples=10_000)

_IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if _IN_CI else "default"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

THOROUGH = settings().max_examples >= 1_000
"""Whether the profile asks for all cases of the tests that count their own; else for a part."""
