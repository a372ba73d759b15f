"""What is found out about a run's inputs before it starts: each finding is fine, a warning, or a problem with a way out."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from raydistill.config import Config, DataSection, ResultsSection
from raydistill.errors import ResourceError, RunError, UserError
from raydistill.preflight.memory import (
    MemoryRemark,
    gpu_memory_here,
    gpu_memory_of,
    gpu_remarks,
    host_remark,
    joins_a_cluster,
)
from raydistill.preflight.storage import check_room
from raydistill.recovery.resume import goes_on_with
from raydistill.results.reachable import silence_of
from raydistill.results.sinks import check_results

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


def findings_of(inputs: RunInputs, plan: Mapping[str, Any]) -> list[Finding]:
    """Everything that can be said of inputs that were read, and of what `make_plan` says of their config: models, template,
    memory, disk, ports. Starts nothing, so a cluster's GPUs are left out: `gpu_findings`."""
    config, trainable = inputs.config, plan["student"]["trainable"]
    found = model_findings(inputs)
    found += _memory([host_remark(plan)])
    if not joins_a_cluster(config):
        found += _memory(gpu_remarks(config, plan, gpu_memory_here()))
    run = goes_on_with(config, inputs.data.fingerprint)
    found += guarded("disk", lambda: [Finding(check="disk", status="ok", text=check_room(config, trainable, run))])
    found += guarded("ports", lambda: [Finding(check="ports", status="ok", text=check_ports())])
    found += guarded("results", lambda: results_findings(config.results))
    return found


def gpu_findings(config: Config, plan: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The plan's GPU memory against the GPUs of the cluster that the config joins, by what `ray.nodes()` gives; without a
    cluster `findings_of` has said it."""
    return _memory(gpu_remarks(config, plan, gpu_memory_of(nodes))) if joins_a_cluster(config) else []


def _memory(remarks: Sequence[MemoryRemark]) -> list[Finding]:
    return [Finding(check="memory", status=said.status, text=said.text) for said in remarks]


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
    if facts.teacher_tokenizer is not None:
        found.append(template_comparison(tokenizer, facts.teacher_tokenizer, inputs.config.data.template))
    found += template_warnings(str(tokenizer.chat_template or ""), inputs.config.data.template)
    if example.has_reference and int(example.reference_ids[-1]) not in facts.eos_ids:
        last = tokenizer.convert_ids_to_tokens([int(example.reference_ids[-1])])[0]
        text = (
            f"the first completion ends with {last!r} and not with {ends}; look at the template's end and data.template"
        )
        found.append(Finding(check="template", status="warning", text=text))
    return found


def template_comparison(student: Any, teacher: Any, variables: Mapping[str, Any]) -> Finding:
    """Prompts are written with the student's chat template; a teacher with another one is asked in a form it may not know."""
    here, there = (rendered_example(tokenizer, variables) for tokenizer in (student, teacher))
    if here == there:
        return Finding(check="template", status="ok", text=f"student.model and teacher.model both render {here!r}")
    return Finding(
        check="template",
        status="warning",
        text=f"student.model renders a question and its answer as {here!r}, teacher.model as {there!r}; the teacher will score "
        "the student's form. Choose a teacher.model with the student's chat template, or copy chat_template.jinja of the form "
        "that you want from one folder into the other",
    )


def rendered_example(tokenizer: Any, variables: Mapping[str, Any]) -> str:
    """A question and its answer as the tokenizer's chat template writes them; without a template as plain text."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages) + str(tokenizer.eos_token)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **variables))
    except TemplateError as error:
        return f"(an error: {error})"


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
