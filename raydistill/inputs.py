"""What a run needs before any actor exists: checked models, token ids, probes, the engines' specification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from raydistill.config import Config
from raydistill.config.load import require_inputs
from raydistill.data.dataset import Dataset, load_dataset
from raydistill.errors import DataError
from raydistill.losses.divergence import check_divergence
from raydistill.messages import TokenRows
from raydistill.preflight.checks import ModelFacts, check_models
from raydistill.progress import say
from raydistill.worlds import resolve_world

if TYPE_CHECKING:
    from raydistill.actors.rollout import EngineSpec

LENGTH_STEP = 32  # engines allocate in blocks of 32 tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """A config whose model and data paths are real, and what was read from them."""

    config: Config
    facts: ModelFacts
    data: Dataset

    @property
    def engine_length(self) -> int:
        """Longest sequence an engine will see."""
        needed = self._longest_prompt + self._new_tokens
        return min(-(-needed // LENGTH_STEP) * LENGTH_STEP, self.facts.max_length)

    @property
    def _longest_prompt(self) -> int:
        return max(example.prompt_ids.size for example in (*self.data.train, *self.data.held_out))

    @property
    def _new_tokens(self) -> int:
        return max(self.config.rollout.max_new_tokens, self.config.evaluation.max_new_tokens)

    def check_lengths(self) -> None:
        """DataError if a completion does not fit behind the longest prompt."""
        if self.config.needs_rollout_pool and self._longest_prompt + self._new_tokens > self.facts.max_length:
            raise DataError(
                f"the longest prompt has {self._longest_prompt} tokens; with {self._new_tokens} new tokens "
                f"(rollout.max_new_tokens, evaluation.max_new_tokens) that is more than the model's "
                f"{self.facts.max_length} positions. Lower those, or data.max_length to leave long prompts out"
            )

    def probes(self) -> TokenRows:
        """Fixed sequences that both sides of a sync score: real rows, so that the gap is measured where it matters."""
        sync, rows = self.config.sync, []
        for example in (*self.data.held_out, *self.data.train):
            ids = [*example.prompt_ids.tolist(), *example.reference_ids.tolist()][-sync.probe_tokens :]
            if len(ids) > 1:
                rows.append(ids)
            if len(rows) == sync.probe_sequences:
                break
        return TokenRows.from_rows(rows)

    def engine_spec(self) -> EngineSpec:
        """All a rollout actor needs to build its engine."""
        from raydistill.actors.rollout import EngineSpec
        from raydistill.models import StudentSpec

        facts = self.facts
        return EngineSpec(
            student=StudentSpec.of(self.config),
            rollout=self.config.rollout,
            max_model_len=self.engine_length,
            eos_ids=facts.eos_ids,
            probes=self.probes(),
            sampled_ids=facts.vocab_size if facts.vocab_size < facts.student_vocab_size else None,
        )


def load_inputs(config: Config, console: Console, datasets: dict[str, Dataset] | None = None) -> RunInputs:
    """Make the world if the config names one, check the models, read the data; starts no actor.

    datasets: what other runs have read, by all that decides it; this run's is added.
    """
    require_inputs(config)
    check_divergence(config.objective.divergence)
    config = resolve_world(config, console)
    facts = check_models(config)
    if config.teacher.model is None:
        config = config.model_copy(
            update={"teacher": config.teacher.model_copy(update={"model": config.student.model})}
        )
    if config.needs_rollouts:  # a sampled completion must fit behind every prompt
        room = max(config.data.min_prompt_room, config.rollout.max_new_tokens)
        config = config.model_copy(update={"data": config.data.model_copy(update={"min_prompt_room": room})})
    needs_reference = config.objective.on_policy_fraction < 1
    datasets = {} if datasets is None else datasets
    key = repr((config.data, config.student.model, facts.max_length, needs_reference, facts.eos_ids))
    if key not in datasets:
        datasets[key] = load_dataset(
            config.data, facts.tokenizer, facts.max_length, needs_reference, stop_ids=facts.eos_ids
        )
    data = datasets[key]
    inputs = RunInputs(config=config, facts=facts, data=data)
    inputs.check_lengths()
    say(console, data.summary(), style="dim")
    return inputs
