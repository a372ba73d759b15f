"""A record and its delivery around something that runs: opened, delivered while it grows, ended as the body ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from raydistill.config import Config
from raydistill.errors import RunStopped
from raydistill.results.deliver import retry_command, start_delivery
from raydistill.results.provenance import collect
from raydistill.results.record import RunRecord
from raydistill.results.store import default_uri


@contextmanager
def recorded(
    folder: Path,
    config: Config,
    console: Console,
    data_fingerprint: str | None = None,
    held_out_fingerprint: str | None = None,
    resume_at: int = 0,
    is_delivered: bool = False,
) -> Iterator[RunRecord]:
    """Record a run in `folder` and deliver it to the config's results store; failures of the body are recorded too.

    A record that is there already is cut back to step `resume_at` and goes on.
    is_delivered: somebody else brings the record to the store.
    A store that does not answer delays delivery and nothing else: one warning says how to deliver later.
    """
    record = RunRecord(folder)
    settings = json.loads(config.model_dump_json())
    if record.is_started:
        record.cut_back(resume_at)
    else:
        record.start(
            name=folder.name,
            config=settings,
            provenance=collect(),
            seed=config.run.seed,
            data_fingerprint=data_fingerprint,
            held_out_fingerprint=held_out_fingerprint,
        )
    uri = config.results.uri or default_uri(config.run.output.absolute())
    delivery = None if is_delivered else start_delivery(folder, uri, config.results.experiment)
    try:
        yield record
        record.end("finished")
    except (KeyboardInterrupt, asyncio.CancelledError, RunStopped):
        record.end("interrupted")
        raise
    except BaseException as error:
        record.end("failed", str(error))
        raise
    finally:
        record.close()
        if delivery is not None and not delivery.finish():
            console.print(
                f"warning: the results store is behind ({delivery.problem}); deliver later with `{retry_command(folder)}`",
                style="yellow",
            )
