"""The verb `raydistill doctor`: everything that can be known before a run costs anything, each complaint with a way out.

Every job makes the same checks first (`launch` calls `storage`, `findings`, `placement`; its first sync is the parity check).
`--parity` starts one rollout engine and compares it with the local student: the noise floor of the policy gap.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from raydistill.cli import command_parser, console, print_table
from raydistill.config import Config
from raydistill.config.load import load_config
from raydistill.errors import RunError, UserError
from raydistill.preflight.findings import Finding, findings_of, gpu_findings, guarded
from raydistill.preflight.storage import check_storage, check_writable

if TYPE_CHECKING:
    from raydistill.inputs import RunInputs

SUMMARY = """\
Check a config before it runs: models, vocabularies, EOS and chat template, data, storage, memory, ports, placement; with
--parity also that the rollout engine computes what the trainer computes. Exit code 2 if there is a problem."""
EXAMPLES = """\
examples:
  raydistill doctor @configs/demo.toml
        all that needs no engine: a few seconds
  raydistill doctor @configs/int4_onpolicy.toml --student.model FOLDER --data.path prompts.jsonl --parity
        also start one rollout engine and measure the noise floor of the policy gap
  raydistill doctor @mine.toml --json
        for scripts: a list of {check, status, text}
"""


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
    found = guarded("storage", lambda: [Finding(check="storage", status="ok", text=check_writable(config))])
    if config.run.storage is not None:
        found += guarded(
            "run.storage", lambda: [Finding(check="run.storage", status="ok", text=str(check_storage(config)))]
        )
    inputs = None
    try:
        from raydistill.inputs import load_inputs
        from raydistill.preflight.plan import make_plan
        from raydistill.preflight.planned import with_built_world

        config = with_built_world(config)
        inputs = load_inputs(config, quiet_console())
    except UserError as error:
        found += [Finding(check="models and data", status="problem", text=line) for line in str(error).splitlines()]
    if inputs is not None:
        config = inputs.config
        plan = make_plan(config)
        found += findings_of(inputs, plan)
        found += gpu_findings(config, plan, cluster_nodes(config))
    found += guarded("placement", lambda: placement_findings(config))
    if parity and not config.needs_rollout_pool:
        text = (
            f"not measured: nothing samples here (objective.on_policy_fraction={config.objective.on_policy_fraction:g}), so "
            "there is no engine to compare; set objective.on_policy_fraction above 0 or evaluation.exact_match, or leave "
            "--parity out"
        )
        found.append(Finding(check="parity", status="warning", text=text))
    elif parity and inputs is not None:
        found += guarded("parity", lambda: parity_findings(inputs))
    return found


def quiet_console() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def cluster_nodes(config: Config) -> Sequence[Mapping[str, Any]]:
    """`ray.nodes()` of the cluster that the config joins; none where it does not get there: that is for the placement."""
    from raydistill.preflight.memory import joins_a_cluster

    if joins_a_cluster(config):
        import ray

        from raydistill.launch import start_cluster

        with suppress(UserError, RunError):
            start_cluster(config)
            return list(ray.nodes())
    return ()


def placement_findings(config: Config) -> list[Finding]:
    """The placement plan against the cluster, where one answers, else against this machine; roles have
    nodes of their own in a cluster only."""
    from raydistill.preflight.placement import check_placement, node_resources, placement_plan

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        import ray

        from raydistill.launch import start_cluster

        start_cluster(config)
        check_placement(config, node_resources(ray.nodes()))
        return [Finding(check="placement", status="ok", text=f"fits the cluster at {address}")]
    cpus = config.cluster.num_cpus or os.cpu_count() or 1
    here = config.model_copy(update={"cluster": config.cluster.model_copy(update={"by_role": False})})
    check_placement(here, [{"CPU": cpus, "GPU": _num_gpus()}])
    parts = ", ".join(f"{d.role} {d.count} x ({d.num_cpus:g} CPU, {d.num_gpus:g} GPU)" for d in placement_plan(config))
    found = [Finding(check="placement", status="ok", text=f"fits a local cluster of {cpus} CPUs: {parts}")]
    if config.cluster.by_role:
        text = (
            "cluster.by_role=true asks for nodes with resources named after roles, which a local cluster has not: `train` will "
            "refuse here; set cluster.address (or RAY_ADDRESS) to the cluster that is meant, or leave cluster.by_role out"
        )
        found.append(Finding(check="placement", status="warning", text=text))
    return found


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
        text += (
            f", but the trainer's are {codes_hash}: both sides must quantize the same way; install the same versions of torch "
            "and raydistill on all nodes, or set rollout.engine='hf', which quantizes as the trainer does"
        )
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

    from raydistill.actors.rollout_pool import RolloutPool
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
        rollouts = await pool.begin("doctor", one, inputs.engine_spec(), None)
        (report,) = await rollouts.load(ray.put(weights), 0, True)
    finally:
        await pool.close()
    return report, hash_codes(codes) if codes else None
