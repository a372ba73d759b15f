"""A record and its delivery around something that runs: opened, delivered while it grows, ended as the body ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from raydistill.config import Config
from raydistill.errors import Stopped
from raydistill.progress import say
from raydistill.results.deliver import FINISH_S, retry_command, start_delivery
from raydistill.results.provenance import collect
from raydistill.results.record import RunRecord
from raydistill.results.store import default_uri

STOPPED_S = 5.0  # for the rest of the delivery after a stop: somebody counts the seconds, and the record stays


@contextmanager
def recorded(
    folder: Path,
    config: Config,
    console: Console,
    data_fingerprint: str | None = None,
    held_out_fingerprint: str | None = None,
    resume_at: int = 0,
    parent: str | None = None,
    delivers: bool = True,
    limit: Callable[[float], float] = lambda wanted_s: wanted_s,
) -> Iterator[RunRecord]:
    """Record a run in `folder` and deliver it to the config's results store; failures of the body are recorded too.

    A record that is there already is cut back to step `resume_at` and goes on, with the settings of now. `parent` is the
    record id of the run that this one belongs to. With `delivers` false somebody else delivers it
    (`start_delivery(..., under=True)`), with `results.deliver` false nobody does yet.
    A store that does not answer delays delivery and nothing else: one warning says how to deliver later. `limit` of some
    seconds is how many of them are left, for a run that was stopped.
    """
    record = RunRecord(folder)
    settings = json.loads(config.model_dump_json())
    if record.is_started:
        record.cut_back(resume_at, settings)
    else:
        record.start(
            name=folder.name,
            config=settings,
            provenance=collect(),
            seed=config.run.seed,
            data_fingerprint=data_fingerprint,
            held_out_fingerprint=held_out_fingerprint,
            parent=parent,
        )
    uri = config.results.uri or default_uri(config.run.output.absolute())
    chosen = config.results
    delivery = start_delivery(folder, uri, chosen.experiment, chosen.sinks) if delivers and chosen.deliver else None
    patience_s = FINISH_S
    try:
        yield record
        record.end("finished")
    except (KeyboardInterrupt, asyncio.CancelledError, Stopped):
        patience_s = STOPPED_S
        record.end("interrupted")
        raise
    except BaseException as error:
        record.end("failed", str(error))
        raise
    finally:
        record.close()
        if delivery is not None and not delivery.finish(limit(patience_s)):
            say(
                console,
                f"warning: the results store is behind ({delivery.problem}); deliver later with `{retry_command(folder)}`",
                style="yellow",
            )
