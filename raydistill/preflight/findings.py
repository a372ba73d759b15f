"""What is found out about a run's inputs before it starts: each finding is fine, a warning, or a problem with a way out."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raydistill.config import DataSection, ResultsSection
from raydistill.errors import ResourceError, RunError, UserError
from raydistill.preflight.storage import check_room
from raydistill.recovery.resume import goes_on_with
from raydistill.results.reachable import silence_of
from raydistill.results.sinks import check_results
from raydistill.results.tables import format_bytes

if TYPE_CHECKING:
    from raydistill.inputs import RunInputs

DEFAULT_TEMPLATE = DataSection().template  # set for every model, whether its template reads it or not
Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    check: str
    status: Status
    text: str


def findings_of(inputs: RunInputs) -> list[Finding]:
    """Everything that can be said of inputs that were read: models, template, memory, disk, ports. Starts nothing."""
    from raydistill.preflight.plan import make_plan

    config = inputs.config
    plan = make_plan(config)
    trainable = plan["student"]["trainable"]
    found = [*model_findings(inputs), memory_finding(plan)]
    run = goes_on_with(config, inputs.data.fingerprint)
    found += guarded("disk", lambda: [Finding(check="disk", status="ok", text=check_room(config, trainable, run))])
    found += guarded("ports", lambda: [Finding(check="ports", status="ok", text=check_ports())])
    found += guarded("results", lambda: results_findings(config.results))
    return found


def guarded(check: str, examine: Callable[[], list[Finding]]) -> list[Finding]:
    """A check's findings, or its error as one."""
    try:
        return examine()
    except (UserError, RunError) as error:
        return [Finding(check=check, status="problem", text=str(error))]


def results_findings(results: ResultsSection) -> list[Finding]:
    """Where results go. A store that is down is worth a word, and no reason to wait: what it misses is kept for it."""
    text = check_results(results)
    silence = silence_of(results.uri) if results.uri is not None else None
    if silence is None:
        return [Finding(check="results", status="ok", text=text)]
    kept = "training goes on without it, and what it misses is delivered once it answers"
    return [Finding(check="results", status="warning", text=f"results.uri does not answer ({silence}): {kept}")]


def model_findings(inputs: RunInputs) -> list[Finding]:
    """What was read: vocabularies, ends, the first row as the models will see it, what the filter left."""
    facts, data = inputs.facts, inputs.data
    tokenizer = facts.tokenizer
    ends = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(list(facts.eos_ids)))
    wider = facts.student_vocab_size - facts.vocab_size
    padding = f"; the student has {wider:,} more, which are never sampled or scored" if wider > 0 else ""
    found = [
        Finding(check="vocabulary", status="ok", text=f"{facts.vocab_size:,} ids that both models know{padding}"),
        Finding(check="end of sequence", status="ok", text=f"{ends}; {facts.max_length:,} positions"),
        Finding(check="data", status="ok", text=data.summary()),
    ]
    example = data.train[0]
    prompt = tokenizer.decode(example.prompt_ids.tolist())
    text = f"{example.row_id}: {prompt!r} -> {tokenizer.decode(example.reference_ids.tolist())!r}"
    variables = ", ".join(f"{name}={value!r}" for name, value in inputs.config.data.template.items())
    found.append(Finding(check="template", status="ok", text=f"{text} (data.template: {variables or 'empty'})"))
    found += template_warnings(str(tokenizer.chat_template or ""), inputs.config.data.template)
    if example.has_reference and int(example.reference_ids[-1]) not in facts.eos_ids:
        last = tokenizer.convert_ids_to_tokens([int(example.reference_ids[-1])])[0]
        text = (
            f"the first completion ends with {last!r} and not with {ends}; look at the template's end and data.template"
        )
        found.append(Finding(check="template", status="warning", text=text))
    return found


def template_warnings(chat_template: str, variables: Mapping[str, Any]) -> list[Finding]:
    """Variables that the chat template does not read, and a day of its own that would change the prompts."""
    texts = [
        f"data.template.{name} is not read by the model's chat template; look for another spelling or remove it"
        for name in variables
        if name not in chat_template and name not in DEFAULT_TEMPLATE
    ]
    if "strftime_now" in chat_template and "date_string" not in variables:
        texts.append(
            "the chat template writes today's date into every prompt, so a run cannot go on tomorrow; if the template reads "
            "date_string, set data.template.date_string, for example to '26 Jul 2024'"
        )
    return [Finding(check="template", status="warning", text=text) for text in texts]


def memory_finding(plan: Mapping[str, Any]) -> Finding:
    """The estimate of `plan` against this machine's memory; GPUs of other machines are not known here."""
    import psutil

    host: dict[str, int] = {}
    for part in plan["memory"]:
        if part["place"] == "host":
            host[part["role"]] = host.get(part["role"], 0) + part["count"] * part["bytes"]
    there, needed = psutil.virtual_memory().total, sum(host.values())
    parts = ", ".join(f"{role} {format_bytes(size)}" for role, size in host.items())
    text = f"about {format_bytes(needed)} of {format_bytes(there)} host memory if all actors run here ({parts})"
    return Finding(check="memory", status="warning" if needed > there else "ok", text=text)


def check_ports() -> str:
    """A line about this machine's network; ResourceError if its processes cannot talk over its own address, as Ray's actors
    and the trainer's ranks do."""
    import ray.util

    address = ray.util.get_node_ip_address()
    try:
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection((address, port), timeout=5):
                pass
    except OSError as error:
        raise ResourceError(
            f"processes of this machine cannot connect to each other at {address} ({error}); look at its firewall, or set "
            "RAY_OVERRIDE_NODE_IP_ADDRESS to an address that works"
        ) from error
    return f"processes here reach each other at {address}"
