"""One data-parallel rank that trains with the real DeepSpeed, case after case; started by test_deepspeed_equivalence.py.

    python rank_worker.py RANK WORLD_SIZE MODEL_FOLDER OUTPUT_FOLDER

Every case builds a student, runs `run_step` on its own share of the same sequences, and saves what it saw in
OUTPUT_FOLDER/<case>-<rank>.pt, or the traceback of what went wrong. Importing DeepSpeed costs more than training, so one
process runs all cases of its world size.
"""

import os
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from raydistill.config import AdapterSection, QuantSection, StudentSection, TrainerSection
from raydistill.losses.objective import Objective
from raydistill.merge import take_scored
from raydistill.messages import REFERENCE_VERSION, Samples, Scored, TeacherDense, TokenRows
from raydistill.models import StudentSpec, build_student
from raydistill.tensors import CompletionModel, SequenceBatch, score_rows, target_tensors
from raydistill.trainer.deepspeed_engine import DeepSpeedEngine
from raydistill.trainer.step import Ranks, run_step

VOCAB = 256  # ids used; below the tiny tokenizer's size
LENGTHS = (23, 3, 17, 2, 19, 4, 21, 1)  # completion tokens of the step's 8 sequences
EVEN = (0, 1, 2, 3, 4, 5, 6, 7)
UNEVEN = (0, 2, 4, 6, 1, 3, 5, 7)  # two ranks: 80 tokens for the first, 10 for the second
SCHEDULED = (
    "nan",
    "gradient",
    "loss",
    "clean",
    "bf16_nan",
)  # cases whose learning rate falls: skipped steps must not move it
PROBES = TokenRows.from_rows([list(range(5, 25)), list(range(40, 60))])

StepKind = Literal["good", "nan-teacher", "infinite-gradient", "infinite-loss"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training run of a few steps."""

    name: str
    zero_stage: int
    optimizer: Literal["sgd", "adamw"] = "sgd"
    mode: Literal["merged", "served", "none"] = "merged"
    format: str = "int4"
    dtype: str = "float32"
    order: tuple[int, ...] = EVEN
    max_grad_norm: float = 1e6
    gradient_checkpointing: bool = False
    steps: tuple[StepKind, ...] = ("good",)
    resume_with: tuple[float, ...] = ()  # learning rates, each of which another engine goes on with for one step


def cases(world_size: int) -> list[Case]:
    """What each world size runs."""
    found = []
    for stage in range(4):
        plain = Case(name=f"merged-{stage}", zero_stage=stage)
        bad = Case(name="", zero_stage=stage, optimizer="adamw", steps=("good", "nan-teacher", "good"))
        found += [plain, replace(bad, name=f"nan-{stage}"), replace(bad, name=f"clean-{stage}", steps=("good", "good"))]
        if world_size == 1:
            found += [replace(plain, name=f"checkpointed-{stage}", gradient_checkpointing=True)]
            found += [replace(plain, name=f"resumed-{stage}", resume_with=(0.1, 0.025))]
            found += [
                Case(name=f"bf16-{stage}", zero_stage=stage, dtype="bfloat16", optimizer="adamw", steps=("good",) * 3)
            ]
        else:
            found += [
                replace(plain, name=f"served-{stage}", mode="served"),
                replace(plain, name=f"uneven-{stage}", order=UNEVEN),
                replace(plain, name=f"clipped-{stage}", order=UNEVEN, max_grad_norm=0.05),
                replace(bad, name=f"gradient-{stage}", steps=("good", "infinite-gradient", "good")),
                replace(bad, name=f"loss-{stage}", steps=("good", "infinite-loss", "good")),
                replace(bad, name=f"bf16_nan-{stage}", dtype="bfloat16"),
            ]
    found.append(Case(name="adamw-2", zero_stage=2, optimizer="adamw", mode="served", steps=("good",) * 3))
    found.append(Case(name="none-2", zero_stage=2, mode="none"))
    return found


def spec(case: Case, model: Path) -> StudentSpec:
    return StudentSpec(
        student=StudentSection(model=str(model), dtype=case.dtype),  # type: ignore[arg-type]
        quant=QuantSection(format=case.format, scale="absmax"),  # type: ignore[arg-type]
        adapter=AdapterSection(mode=case.mode, rank=8, alpha=16),
    )


def student(case: Case, model: Path) -> CompletionModel:
    """B starts at 0, where A has no gradient; random values exercise both."""
    torch.manual_seed(0)
    built = build_student(spec(case, model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    if case.gradient_checkpointing:
        built.enable_input_require_grads()
        built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return CompletionModel(built)


def sequences(step: int, vocab_size: int, bad: bool = False) -> Scored:
    """The step's 8 sequences with the answers of a random teacher; `bad`: its last answer is NaN."""
    draw = np.random.default_rng(step)
    prompts = [draw.integers(3, VOCAB, size=int(n)) for n in draw.integers(2, 9, size=len(LENGTHS))]
    completions = [draw.integers(3, VOCAB, size=n) for n in LENGTHS]
    logits = torch.from_numpy(draw.normal(size=(sum(LENGTHS), vocab_size)).astype(np.float32) * 3)
    answers = torch.log_softmax(logits, -1).numpy()
    if bad:
        answers[-1, 7] = np.nan
    samples = Samples(
        step=step,
        indices=tuple(range(len(LENGTHS))),
        row_ids=tuple(str(i) for i in range(len(LENGTHS))),
        prompts=TokenRows.from_rows(prompts),
        completions=TokenRows.from_rows(completions),
        policy_versions=(REFERENCE_VERSION,) * len(LENGTHS),
        finish_reasons=("reference",) * len(LENGTHS),
    )
    return Scored(samples=samples, target=TeacherDense(logprobs_NV=answers))


OBJECTIVE = Objective(beta=0.5, ce_weight=0.1)


class InfiniteLoss:
    """An infinite loss whose gradient is finite."""

    def token_losses(self, *arguments: Any) -> Any:
        losses = OBJECTIVE.token_losses(*arguments)
        return replace(losses, loss_N=losses.loss_N + float("inf"))


def make_optimizer(case: Case, parameters: list[Any]) -> torch.optim.Optimizer:
    if case.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.1)
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)


def plain_torch(case: Case, model: Path) -> dict[str, Any]:
    """The same steps without DeepSpeed: one batch, one process; what every split must equal."""
    from raydistill.quant.student import adapter_state

    trained = student(case, model)
    trained.train()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = make_optimizer(case, parameters)
    before = adapter_state(trained.model)
    for step in range(len(case.steps)):
        scored = sequences(step, trained.model.config.vocab_size)
        logits_NV = trained(SequenceBatch.of_samples(scored.samples, "cpu"))
        assert scored.target is not None
        ids_N = torch.from_numpy(scored.samples.completions.ids_T.copy()).long()
        target = target_tensors(scored.target, "cpu")
        losses = OBJECTIVE.token_losses(logits_NV, target, ids_N, torch.ones_like(ids_N, dtype=torch.bool))
        losses.loss_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, case.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {"before": before, "after": adapter_state(trained.model)}


class Rank:
    """One rank of one world."""

    def __init__(self, rank: int, world_size: int, model: Path) -> None:
        self.rank, self.world_size, self.model = rank, world_size, model

    def run(self, case: Case) -> dict[str, Any]:
        per_micro_batch = 2
        section = TrainerSection(
            num_workers=self.world_size,
            num_steps=4,
            sequences_per_step=len(LENGTHS),
            sequences_per_micro_batch=per_micro_batch,
            max_grad_norm=case.max_grad_norm,
            zero_stage=case.zero_stage,  # type: ignore[arg-type]
            lr_schedule="constant" if case.name.split("-")[0] not in SCHEDULED else "linear",
            warmup_fraction=0.0,
        )
        model = student(case, self.model)
        vocab_size = model.model.config.vocab_size
        parameters = [p for p in model.parameters() if p.requires_grad]
        engine = DeepSpeedEngine(model, section, case.dtype, optimizer=make_optimizer(case, parameters))
        share = len(LENGTHS) // self.world_size
        mine = case.order[self.rank * share : (self.rank + 1) * share]
        seen: list[dict[str, Any]] = [self._look(engine, model, None)]
        for number, kind in enumerate(case.steps):
            # A skipped step does not count: the next good one uses the tokens that a clean run uses.
            good_before = sum(k == "good" for k in case.steps[:number])
            scored = sequences(good_before, vocab_size, bad=kind == "nan-teacher")
            batches = [
                take_scored(scored, mine[first : first + per_micro_batch]) for first in range(0, share, per_micro_batch)
            ]
            model.train()
            on_last_rank = self.rank == self.world_size - 1
            hooks = []
            if kind == "infinite-gradient" and on_last_rank:
                hooks.append(parameters[0].register_hook(lambda gradient: gradient * float("inf")))
            objective: Any = InfiniteLoss() if kind == "infinite-loss" and on_last_rank else OBJECTIVE
            done = run_step(engine, objective, batches, number, Ranks(world_size=self.world_size, sum=self._sum), "cpu")
            for hook in hooks:
                hook.remove()
            seen.append(self._look(engine, model, done))
        with TemporaryDirectory() as folder:
            if case.resume_with:
                engine.save_state(Path(folder))
            resumed = {rate: self._resumed(case, section, Path(folder), rate) for rate in case.resume_with}
        return {"steps": seen, "resumed": resumed}

    def _resumed(self, case: Case, section: TrainerSection, folder: Path, rate: float) -> list[dict[str, Any]]:
        """One more step with another learning rate, by an engine that goes on where one was saved."""
        model = student(case, self.model)
        optimizer = make_optimizer(case, [p for p in model.parameters() if p.requires_grad])
        again = section.model_copy(update={"learning_rate": rate})
        engine = DeepSpeedEngine(model, again, case.dtype, optimizer=optimizer)
        engine.load_state(folder)
        before = self._look(engine, model, None)
        per_micro_batch = section.sequences_per_micro_batch
        scored = sequences(len(case.steps), model.model.config.vocab_size)
        batches = [
            take_scored(scored, EVEN[first : first + per_micro_batch]) for first in range(0, len(EVEN), per_micro_batch)
        ]
        model.train()
        ranks = Ranks(world_size=self.world_size, sum=self._sum)
        done = run_step(engine, OBJECTIVE, batches, len(case.steps), ranks, "cpu")
        return [before, self._look(engine, model, done)]

    def _look(self, engine: Any, model: CompletionModel, done: Any) -> dict[str, Any]:
        """What the worker publishes after a step."""
        state = engine.adapter_state()
        model.eval()
        probe = torch.from_numpy(score_rows(model, PROBES, "cpu"))
        codes = engine.codes_hash(torch.distributed.get_rank())
        return {
            "state": state,
            "probe": probe,
            "codes": codes,
            "learning_rate": engine.learning_rate,
            "skipped": None if done is None else done.skipped,
            "metrics": {} if done is None else {m.name: m.value for m in done.metrics},
        }

    def _sum(self, vector: Tensor) -> Tensor:
        total = vector.clone()
        torch.distributed.all_reduce(total)
        return total


def partition_small_tensors() -> None:
    """ZeRO-3 leaves tensors below 100,000 elements whole; here all are that small, so let it cut them as it cuts large ones."""
    from raydistill.trainer import deepspeed_engine

    usual = deepspeed_engine.deepspeed_config

    def config(section: TrainerSection, dtype: str) -> dict[str, Any]:
        settings = usual(section, dtype)
        if section.zero_stage == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    deepspeed_engine.deepspeed_config = config


def main(rank: int, world_size: int, model: Path, output: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{output}/rendezvous-{world_size}", rank=rank, world_size=world_size
    )
    partition_small_tensors()
    runner = Rank(rank, world_size, model)
    wanted = sys.argv[5:]
    for case in cases(world_size):
        if wanted and case.name not in wanted:
            continue
        try:
            result = runner.run(case)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, output / f"{case.name}-of{world_size}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
