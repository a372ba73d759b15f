"""`python tune/sweep.py FILE.toml ...`: run a sweep; `raydistill sweep` is the same."""

from __future__ import annotations

import sys

from raydistill.cli import main_with_errors
from raydistill.sweep.command import sweep_command

if __name__ == "__main__":
    sys.exit(main_with_errors(sweep_command))
