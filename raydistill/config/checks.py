"""Which settings exclude each other. Every message names the fields, their values and a way out.

`config` calls one function per section, and one for the whole tree, when a section is made; each raises on the first
combination that cannot work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydistill.config.schema import Config
    from raydistill.config.sections import (
        AdapterSection,
        EvaluationSection,
        ObjectiveSection,
        QuantSection,
        ResultsSection,
        RolloutSection,
        RunSection,
        StudySection,
        TeacherSection,
        TrainerSection,
        WorldSection,
    )

BETA_EDGE = 1e-3  # closer to 0 or 1 the float32 quotient D/(beta(1-beta)) is off by 5 % and more
WORLD_FILES = {
    "question_answers": "a JSONL file of rows {question, answer}",
    "text": "a text file with a paragraph per line",
}


def check_results_section(results: ResultsSection) -> None:
    if results.sinks and not results.deliver:
        raise ValueError(
            f"results.sinks={list(results.sinks)} get the record with the results store, and results.deliver=false; leave one "
            "of the two out"
        )


def check_run(run: RunSection) -> None:
    if run.storage is None:
        return
    scheme, separator, place = run.storage.partition("://")
    if not scheme or not separator:
        raise ValueError(
            f"run.storage={run.storage!r} is no URL; use one such as s3://bucket/prefix, or leave it out to keep all of a "
            "run under run.output"
        )
    if not place.strip("/"):
        raise ValueError(f"run.storage={run.storage!r} names no bucket; use {scheme}://bucket/prefix")
    if scheme in ("file", "local") and not place.startswith("/"):
        raise ValueError(
            f"run.storage={run.storage!r} is relative, and jobs and nodes start in other folders; use {scheme}:///{place} "
            "with the whole path"
        )


def check_objective(objective: ObjectiveSection) -> None:
    if 0 < objective.beta < BETA_EDGE or 1 - BETA_EDGE < objective.beta < 1:
        raise ValueError(
            f"objective.beta={objective.beta} is too near an end for float32; use {round(objective.beta)} or at least "
            f"{BETA_EDGE} away from it"
        )
    if objective.distill_weight == 0 and objective.ce_weight == 0:
        raise ValueError(
            "objective.distill_weight=0 and objective.ce_weight=0 leave nothing to learn from; set one above 0"
        )
    if objective.distill_weight == 0 and objective.on_policy_fraction > 0:
        raise ValueError(
            f"objective.distill_weight=0 with objective.on_policy_fraction={objective.on_policy_fraction}: completions "
            "of the student carry no label; set on_policy_fraction to 0 or distill_weight above 0"
        )


def check_quant(quant: QuantSection) -> None:
    if isinstance(quant.group_size, int) and quant.group_size < 1:
        raise ValueError(f"quant.group_size={quant.group_size} is below 1; use a size such as 32, or 'channel'")
    _ = quant.weight_format  # raises where its fields do not go together


def check_adapter(adapter: AdapterSection) -> None:
    if adapter.mode != "served" and adapter.dropout > 0:
        raise ValueError(
            f"adapter.dropout={adapter.dropout} does not go with adapter.mode={adapter.mode!r}: only a served adapter "
            "is a branch of its own; set dropout to 0 or mode to 'served'"
        )
    if adapter.mode != "none" and not adapter.targets:
        raise ValueError(
            f"adapter.targets is empty with adapter.mode={adapter.mode!r}: nothing would be trained; name layers, "
            "such as q_proj, or set mode to 'none' to train all weights"
        )


def check_rollout(rollout: RolloutSection) -> None:
    if rollout.min_new_tokens > rollout.max_new_tokens:
        raise ValueError(
            f"rollout.min_new_tokens={rollout.min_new_tokens} is above rollout.max_new_tokens={rollout.max_new_tokens};"
            " lower the first or raise the second"
        )
    if rollout.engine == "hf" and rollout.tensor_parallel_size > 1:
        raise ValueError(
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size} needs rollout.engine='vllm', not 'hf'; "
            "set it to 1 or change the engine"
        )
    if rollout.tensor_parallel_size > 1 and rollout.num_gpus not in (0, rollout.tensor_parallel_size):
        raise ValueError(
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size} needs rollout.num_gpus="
            f"{rollout.tensor_parallel_size} for each actor (or 0: on CPUs), not {rollout.num_gpus:g}; change one of the two"
        )
    if rollout.tensor_parallel_size == 1 and rollout.num_gpus > 1:
        way_out = (
            "use 1, or rollout.engine='vllm'" if rollout.engine == "hf" else "set both to the same number, or use 1"
        )
        raise ValueError(
            f"rollout.num_gpus={rollout.num_gpus:g} with rollout.tensor_parallel_size=1: one engine would use one of them; "
            f"{way_out}"
        )


def check_teacher(teacher: TeacherSection) -> None:
    if teacher.num_gpus > 1 and teacher.num_gpus != int(teacher.num_gpus):
        raise ValueError(
            f"teacher.num_gpus={teacher.num_gpus:g} is neither a share of one GPU nor a number of GPUs; use "
            f"{int(teacher.num_gpus)} or {int(teacher.num_gpus) + 1}, or at most 1 to share a GPU"
        )


def check_evaluation(evaluation: EvaluationSection) -> None:
    if evaluation.num_gpus > 1:
        raise ValueError(
            f"evaluation.num_gpus={evaluation.num_gpus:g}: the evaluation actor holds the student on one device; use 1 or a "
            "share of one"
        )


def check_trainer(trainer: TrainerSection) -> None:
    if trainer.num_gpus > 1:
        raise ValueError(
            f"trainer.num_gpus={trainer.num_gpus:g}: one worker drives one GPU; use 1 and set trainer.num_workers to the "
            "number of GPUs (trainer.zero_stage=3 splits the student over them once it is built)"
        )
    if trainer.num_workers > 1 and 0 < trainer.num_gpus <= 0.5:
        raise ValueError(
            f"trainer.num_gpus={trainer.num_gpus:g} with trainer.num_workers={trainer.num_workers}: NCCL refuses two workers "
            "on one GPU; use 1 for each (more than 0.5 if another role shares it), or one worker"
        )
    per_round = trainer.num_workers * trainer.sequences_per_micro_batch
    fitting = max(per_round, trainer.sequences_per_step - trainer.sequences_per_step % per_round)
    if trainer.sequences_per_step % trainer.num_workers:
        raise ValueError(
            f"trainer.sequences_per_step={trainer.sequences_per_step} does not split over "
            f"trainer.num_workers={trainer.num_workers}; use {fitting} or change the worker count"
        )
    if trainer.sequences_per_step % per_round:
        raise ValueError(
            f"trainer.sequences_per_step={trainer.sequences_per_step} is no multiple of trainer.num_workers="
            f"{trainer.num_workers} x trainer.sequences_per_micro_batch={trainer.sequences_per_micro_batch}; use "
            f"{fitting} or change the micro-batch"
        )


def check_world(world: WorldSection) -> None:
    if world.name in WORLD_FILES and (world.train_path is None or world.test_path is None):
        missing = "world.train_path" if world.train_path is None else "world.test_path"
        raise ValueError(
            f"world.name={world.name!r} needs {missing}: {WORLD_FILES[world.name]}; set it or "
            "use world.name='stories', which makes its own rows"
        )
    if world.name not in WORLD_FILES and (world.train_path is not None or world.test_path is not None):
        given = "world.train_path" if world.train_path is not None else "world.test_path"
        raise ValueError(
            f"{given} is set but world.name={world.name!r} reads no files; set world.name to 'question_answers' or 'text', or "
            "use data.path for the rows of an ordinary run"
        )
    if world.name == "none" and world.recipe:
        raise ValueError(
            f"world.recipe={world.recipe} has no effect with world.name='none'; choose a world or clear the recipe"
        )


def check_study(study: StudySection) -> None:
    for name in ("arms", "ptq_methods", "ptq_formats", "tasks"):
        values = getattr(study, name)
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"study.{name} names {twice!r} twice; name it once")
    if not study.arms:
        raise ValueError("study.arms is empty: nothing would be distilled; name an arm, or use `raydistill ptq`")
    if "rtn" not in study.ptq_methods:
        raise ValueError(
            f"study.ptq_methods={list(study.ptq_methods)} leaves out 'rtn', which chooses the grid that the student is "
            "trained on; add it"
        )
    for name in ("task_data", "task_limit", "num_fewshot"):
        if getattr(study, name) is not None and not study.tasks:
            raise ValueError(
                f"study.{name}={str(getattr(study, name))!r} has no effect without study.tasks; name tasks, or leave it out"
            )


def check_tree(config: Config) -> None:
    if config.needs_rollouts and config.rollout.max_new_tokens >= config.data.max_length:
        raise ValueError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt within "
            f"data.max_length={config.data.max_length}; lower the first or raise the second"
        )
    if config.data.min_prompt_room >= config.data.max_length:
        raise ValueError(
            f"data.min_prompt_room={config.data.min_prompt_room} is not below data.max_length={config.data.max_length}:"
            " no row could be kept; lower the first or raise the second"
        )
    if config.data.min_completion >= config.data.max_length:
        raise ValueError(
            f"data.min_completion={config.data.min_completion} is not below data.max_length={config.data.max_length}: "
            "no row could be kept; lower the first or raise the second"
        )
    if config.evaluation.exact_match != "off" and config.evaluation.max_new_tokens >= config.data.max_length:
        raise ValueError(
            f"evaluation.max_new_tokens={config.evaluation.max_new_tokens} leaves no room for a prompt within "
            f"data.max_length={config.data.max_length}; lower the first, raise the second, or set "
            "evaluation.exact_match to 'off'"
        )
    if config.trainer.zero_stage == 3 and config.quant.format != "none" and config.adapter.mode == "none":
        raise ValueError(
            f"trainer.zero_stage=3 with adapter.mode='none' and quant.format={config.quant.format!r}: fake "
            "quantization needs whole weight groups on each rank; use zero_stage=2 or an adapter"
        )
