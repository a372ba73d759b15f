"""The verb `raydistill doctor`: everything that can be known before a run costs anything, each complaint with a way out.

The cheap checks also run first in every job (`launch` calls `storage`, `inputs`, `placement`). `--parity` also starts one
rollout engine and compares it with the local student: the noise floor of the policy gap.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from raydistill.cli import command_parser, console, print_table
from raydistill.config import Config
from raydistill.config.load import load_config
from raydistill.errors import RunError, UserError
from raydistill.preflight.storage import check_room, check_writable
from raydistill.results.tables import format_bytes

if TYPE_CHECKING:
    from raydistill.inputs import RunInputs

SUMMARY = """\
Check a config before it runs: models, vocabularies, EOS and chat template, data, storage, memory, placement; with --parity
also that the rollout engine computes what the trainer computes. Exit code 2 if there is a problem."""
EXAMPLES = """\
examples:
  raydistill doctor @configs/demo.toml
        all that needs no engine: a few seconds
  raydistill doctor @configs/int4_onpolicy.toml --student.model FOLDER --data.path prompts.jsonl --parity
        also start one rollout engine and measure the noise floor of the policy gap
  raydistill doctor @mine.toml --json
        for scripts: a list of {check, status, text}
"""
Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    check: str
    status: Status
    text: str


def doctor_command(argv: Sequence[str]) -> int:
    """The verb `doctor`."""
    parser = command_parser("doctor", SUMMARY, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "--parity", action="store_true", help="start one rollout engine and compare it with the trainer"
    )
    options, settings = parser.parse_known_args(list(argv))
    found = examine(load_config(settings).config, options.parity)
    rows = [asdict(finding) for finding in found]
    print_table(rows, ["check", "status", "text"], json=options.json)
    problems = sum(finding.status == "problem" for finding in found)
    if not options.json:
        console.print(f"{problems} problems" if problems else "ready to run", style="red" if problems else "green")
    return 2 if problems else 0


def examine(config: Config, parity: bool = False) -> list[Finding]:
    """Every check that can be made; one that needs what an earlier one missed is left out."""
    found = _guarded("storage", lambda: [Finding(check="storage", status="ok", text=check_writable(config))])
    inputs = None
    try:
        from raydistill.inputs import load_inputs
        from raydistill.preflight.plan import Speeds, make_plan, with_world_model

        config = with_world_model(config)
        inputs = load_inputs(config, quiet_console())
    except UserError as error:
        found += [Finding(check="models and data", status="problem", text=line) for line in str(error).splitlines()]
    if inputs is not None:
        config = inputs.config
        found += model_findings(inputs)
        plan = make_plan(config, Speeds(rates={}))
        found.append(memory_finding(plan))
        trainable = plan["student"]["trainable"]
        found += _guarded("disk", lambda: [Finding(check="disk", status="ok", text=check_room(config, trainable))])
    found += _guarded("placement", lambda: placement_findings(config))
    if parity and inputs is not None and config.needs_rollout_pool:
        found += _guarded("parity", lambda: parity_findings(inputs))
    return found


def quiet_console() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def _guarded(check: str, examine: Callable[[], list[Finding]]) -> list[Finding]:
    """A check's findings, or its error as one."""
    try:
        return examine()
    except (UserError, RunError) as error:
        return [Finding(check=check, status="problem", text=str(error))]


def model_findings(inputs: RunInputs) -> list[Finding]:
    """What was read: vocabularies, ends, the first row as the models will see it, what the filter left."""
    facts, data = inputs.facts, inputs.data
    tokenizer = facts.tokenizer
    ends = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(list(facts.eos_ids)))
    wider = facts.student_vocab_size - facts.vocab_size
    padding = f"; the student has {wider:,} more, which are never sampled" if wider > 0 else ""
    found = [
        Finding(check="vocabulary", status="ok", text=f"{facts.vocab_size:,} ids that both models have{padding}"),
        Finding(check="end of sequence", status="ok", text=f"{ends}; {facts.max_length:,} positions"),
        Finding(check="data", status="ok", text=data.summary()),
    ]
    example = data.train[0]
    prompt = tokenizer.decode(example.prompt_ids.tolist())
    text = f"{example.row_id}: {prompt!r} -> {tokenizer.decode(example.reference_ids.tolist())!r}"
    found.append(Finding(check="template", status="ok", text=text))
    if example.has_reference and int(example.reference_ids[-1]) not in facts.eos_ids:
        last = tokenizer.convert_ids_to_tokens([int(example.reference_ids[-1])])[0]
        text = (
            f"the first completion ends with {last!r} and not with {ends}; look at the template's end and data.template"
        )
        found.append(Finding(check="template", status="warning", text=text))
    return found


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


def placement_findings(config: Config) -> list[Finding]:
    """The placement plan against the cluster, where one answers, else against this machine."""
    from raydistill.preflight.placement import check_placement, largest_node_gpus, placement_plan

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        import ray

        from raydistill.launch import start_cluster

        start_cluster(config)
        check_placement(config, ray.cluster_resources(), largest_node_gpus(ray.nodes()))
        return [Finding(check="placement", status="ok", text=f"fits the cluster at {address}")]
    cpus = config.cluster.num_cpus or os.cpu_count() or 1
    here = config.model_copy(update={"cluster": config.cluster.model_copy(update={"by_role": False})})
    check_placement(here, {"CPU": cpus, "GPU": _num_gpus()})
    parts = ", ".join(f"{d.role} {d.count} x ({d.num_cpus:g} CPU, {d.num_gpus:g} GPU)" for d in placement_plan(config))
    return [Finding(check="placement", status="ok", text=f"fits a local cluster of {cpus} CPUs: {parts}")]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def parity_findings(inputs: RunInputs) -> list[Finding]:
    """Start one rollout engine at version 0 and compare it with the student as the trainer computes it."""
    from raydistill.launch import start_cluster

    start_cluster(inputs.config)
    report, codes_hash = asyncio.run(_parity(inputs))
    bound = inputs.config.policy_gap_bound_nats
    gap = f"mean {report.gap_mean_nats:.1e}, p99 {report.gap_p99_nats:.1e} nats (bound {bound:.0e})"
    text = f"noise floor of the policy gap: {gap}; codes {report.codes_hash}"
    if report.codes_hash != codes_hash:
        text += f", but the trainer's are {codes_hash}: both sides must quantize the same way"
    elif not report.gap_mean_nats <= bound:
        text += (
            "; try student.dtype='float32' or rollout.engine='hf', or raise sync.max_policy_gap_nats if you know why"
        )
    else:
        return [Finding(check="parity", status="ok", text=text)]
    return [Finding(check="parity", status="problem", text=text)]


async def _parity(inputs: RunInputs) -> tuple[Any, str | None]:
    import ray
    import torch

    from raydistill.actors.pools import RolloutPool
    from raydistill.messages import ProbeAnswers, StudentWeights
    from raydistill.models import StudentSpec, build_student
    from raydistill.quant.hashing import hash_codes
    from raydistill.quant.student import adapter_state, student_codes
    from raydistill.tensors import CompletionModel, score_rows

    config = inputs.config
    one = config.model_copy(update={"rollout": config.rollout.model_copy(update={"num_actors": 1})})
    torch.manual_seed(config.run.seed)
    student = build_student(StudentSpec.of(config)).eval()
    with torch.inference_mode():
        answers = ProbeAnswers(logprobs_N=score_rows(CompletionModel(student), inputs.probes(), "cpu"))
    codes = student_codes(student)
    tensors = {name: tensor.numpy() for name, tensor in adapter_state(student).items()}
    weights = StudentWeights(version=0, tensors=tensors, probe=answers)
    pool = RolloutPool(one.rollout, one.cluster.by_role)
    try:
        await pool.begin(one, inputs.engine_spec(), None, lambda step, index: 0)
        (report,) = await pool.load(ray.put(weights), 0, True)
    finally:
        pool.shutdown()
    return report, hash_codes(codes) if codes else None
