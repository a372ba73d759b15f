"""Every error a user can cause. Each one says what is wrong, where, and what to do about it.

Entry points print a `UserError` as one line and exit with code 2; anything else is our bug and keeps its traceback.
The errors cross process borders, so each pickles: one message string, no other state.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user gave us cannot work; the message names the field or file and a way out."""


class ConfigError(UserError):
    """A setting is unknown, out of range or does not fit another setting."""


class DataError(UserError):
    """A data file is missing, empty or malformed; the message names the file and the line."""


class ModelError(UserError):
    """A model folder cannot be used, or teacher and student do not fit together."""


class QuantError(UserError):
    """A weight format or an adapter does not fit the model's layers, or an exported folder is damaged."""


class ResourceError(UserError):
    """The placement plan asks for more than the cluster has."""


class RunError(RuntimeError):
    """A run cannot go on although its input was right: an actor that keeps dying, a policy gap, too many bad steps."""


class StorageError(RunError):
    """`run.storage` does not take or give what it is asked for; the message names the URL, the reason and a way out."""


class LostError(RunError):
    """Part of a run is gone that cannot be replaced on the way: a trainer rank, the feed, Ray Train's controller, or
    tensors on a node that died. The last checkpoint is the way on."""


class Stopped(Exception):  # noqa: N818
    """Somebody asked for an end (Ctrl-C, SIGTERM), and the same command goes on from here. Not an error."""


class RunStopped(Stopped):
    """A run was stopped; what was trained is in a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped before step {step}")
        self.step = step


class SweepStopped(Stopped):
    """A sweep was stopped; its finished trials are kept, the others go on from their checkpoints."""


class PolicyGapError(RunError):
    """Trainer and rollout engine no longer compute the same function for the same policy version."""


class StaleWeightsError(RunError):
    """An engine holds other weights than the version it was asked for."""


@contextmanager
def disk_errors(what: str, *others: type[Exception]) -> Iterator[None]:
    """A disk that is full, read-only or gone is one clear line: `cannot write WHAT: ...`.

    others: what libraries raise in place of an OSError.
    """
    caught: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except caught as error:
        if isinstance(error, RunError):
            raise  # a clear line already
        reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"cannot write {what}: {reason}; make room there (or fix the folder's permissions) and start the same command "
            "again to resume"
        ) from error
