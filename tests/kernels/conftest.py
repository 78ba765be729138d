"""What is here runs under TRITON_INTERPRET=1, which counts for a whole process (tests/test_interpreted.py)."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
