from __future__ import annotations

import os

# Triton decides when a kernel is defined whether it is interpreted, so those tests need a process
# of their own, which test_interpreted.py starts.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
