"""What all commands share: how errors end a command, where text goes, how `--help` looks; and the verb `config`.

Results go to stdout (with `--json` as pure JSON), progress and errors to stderr, so that a pipe sees results only.
Exit codes: 0 done, 1 the run could not go on, 2 the user can fix it (one line per problem), 130 interrupted. So is a file
that the system does not let us read or write, whoever meets it, unless Python's development mode (`python -X dev`) or
--verbose asks for the traceback. Any other error is our bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from json import dumps
from math import isfinite
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raydistill.background import end_beside
from raydistill.config.help import field_help, format_resolved, json_schema
from raydistill.config.load import load_config
from raydistill.errors import RunError, Stopped, UserError
from raydistill.quiet import quiet_libraries

EXIT_RUN_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
VERBOSE = {"--verbose", "--run.verbose"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_WAYS_OUT = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or name another place"),
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a folder where a file stands now",
    **dict.fromkeys(DISK_FULL, "make room there"),
}
PIPE_WIDTH = 200  # columns where no terminal limits them: wide enough that no cell of a table wraps and no bar is cut


def _end_quickly() -> None:
    """Keep the interpreter from going through all objects again as it ends: with torch and Ray loaded that takes seconds."""
    if "triton" not in sys.modules:  # it would report each of its functions as a leak
        gc.freeze()


atexit.register(_end_quickly)


def open_console(*, stderr: bool = False) -> Console:
    """Prints text as it is; as wide as its terminal, or `PIPE_WIDTH` for a pipe, a file or a job's log."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


console = open_console(stderr=True)
"""Progress and remarks of every command."""

CONFIG_ARGUMENTS = """\
settings:
  @file.toml                          a config file; several stack, later ones win
  --section.field value               override one field (also --section.field=value)
  --run.verbose                       a yes/no field; --run.verbose false turns it off
  --quant.skip lm_head,embed_tokens   a list: comma-separated, or '["lm_head"]'
  --results.tags.owner me             one entry of a table
  --data.max_rows none                unset an optional field
"""

CONFIG_EXAMPLES = """\
examples:
  raydistill config @configs/demo.toml
        the resolved settings of the demo, each with the file and line it comes from
  raydistill config @configs/int4_offpolicy.toml @my_run.toml --trainer.learning_rate 1e-4
        check a stack of files and an override without starting anything
  raydistill config @configs/demo.toml > frozen.toml
        one file with every value written out; it loads again as @frozen.toml
  raydistill config --fields=trainer
        what each field of a section means, its default and what it accepts
  raydistill config --schema > raydistill.schema.json
        a JSON schema, for editors that complete and check TOML
"""


def main_with_errors(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command and turn what ends it into an exit code; `sys.exit(main_with_errors(config_command))`."""
    arguments = sys.argv[1:] if argv is None else argv
    if "--verbose" not in arguments:
        quiet_libraries()
    try:
        code = command(arguments) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        for line in _original(error).splitlines() or ["(no message)"]:
            print(f"error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_RUN_FAILED
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return end_beside(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        complaint = _file_complaint(error)
        if complaint is None or sys.flags.dev_mode or VERBOSE & set(arguments):
            raise
        print(f"error: {complaint}", file=sys.stderr)
        return EXIT_RUN_FAILED if error.errno in DISK_FULL else EXIT_USER_ERROR


def _file_complaint(error: OSError) -> str | None:
    """The file and what the system has against it; None for what may well be our bug, such as a file that is missing."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    if not names or error.errno not in _WAYS_OUT:
        return None
    return f"{' -> '.join(names)}: {error.strerror}; {_WAYS_OUT[error.errno]}"


def _original(error: UserError) -> str:
    """The message alone: Ray re-raises an actor's error with a traceback in its text and the error as `cause`."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, UserError) else error)


def command_parser(verb: str, summary: str, examples: str = "", takes_config: bool = True) -> argparse.ArgumentParser:
    """A parser for a verb's own switches; config arguments are what `parse_known_args` leaves over, in order."""
    return argparse.ArgumentParser(
        prog=f"raydistill {verb}",
        usage=f"raydistill {verb} [@file.toml ...] [switches] [--section.field value ...]" if takes_config else None,
        description=summary,
        epilog="\n".join(part for part in (CONFIG_ARGUMENTS if takes_config else "", examples) if part),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run_arguments(parser: argparse.ArgumentParser, argv: Sequence[str], json_help: str) -> tuple[bool, list[str]]:
    """Switches of the verbs that run something: (whether `--json` was given, the config arguments that are left)."""
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument(
        "--verbose", action="store_true", help="let vLLM, Ray and DeepSpeed write to the console (as --run.verbose)"
    )
    parser.add_argument(
        "--resume", choices=("auto", "never"), help="never: start anew even if an unfinished run could go on"
    )
    options, settings = parser.parse_known_args(list(argv))
    if options.verbose:
        settings += ["--run.verbose", "true"]
    if options.resume:
        settings += ["--run.resume", options.resume]
    return options.json, settings


def config_command(argv: Sequence[str]) -> int:
    """The verb `raydistill config`: show, check and explain settings. Starts nothing."""
    parser = command_parser(
        "config", "Show the settings that a run would use, and where each one comes from.", CONFIG_EXAMPLES
    )
    parser.add_argument("--json", action="store_true", help="print the settings and their sources as JSON")
    parser.add_argument("--schema", action="store_true", help="print a JSON schema of config files")
    parser.add_argument("--fields", nargs="?", const="", metavar="SECTION", help="list every field (of one section)")
    switches, settings = parser.parse_known_args(list(argv))
    if switches.schema:
        print(dumps(json_schema(), indent=2))
        return 0
    if switches.fields is not None:
        print(field_help(switches.fields or None), end="")
        return 0
    loaded = load_config(settings)
    if switches.json:
        print(dumps({"config": loaded.config.model_dump(mode="json"), "sources": dict(loaded.sources)}, indent=2))
    else:
        print(format_resolved(loaded), end="")
    return 0


def print_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], json: bool = False, title: str | None = None
) -> None:
    """Print rows on stdout: a table for people, or with `json` a JSON list of objects with exactly these columns."""
    if json:
        print(dumps([{column: _json_value(row.get(column)) for column in columns} for row in rows], indent=2))
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        cells = [row.get(column) for row in rows]
        is_number = any(_is_number(cell) for cell in cells) and all(cell is None or _is_number(cell) for cell in cells)
        table.add_column(Text(column), justify="right" if is_number else "left", no_wrap=is_number)
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column))) for column in columns))
    open_console().print(table)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json_value(value: Any) -> Any:
    """Numbers, text and None as they are; what JSON cannot say (NaN, infinity) as null, anything else as text."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
