"""``python -m safeopt``."""

import sys

from safeopt.cli import main

sys.exit(main())
