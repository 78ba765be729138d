"""Settings of all tests."""

from __future__ import annotations

import os

# The models of the tests are so small that threads cost more than they bring. Set before torch is first imported, and
# in the environment, so that the commands which tests start have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
