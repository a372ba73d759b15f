"""`python -m raydistill.evaluate`: the verb `raydistill evaluate` in a process of its own."""

import sys

from raydistill.cli import main_with_errors
from raydistill.evaluate.command import evaluate_command

if __name__ == "__main__":
    sys.exit(main_with_errors(evaluate_command))
