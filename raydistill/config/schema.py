"""The one configuration tree, of all sections; reading files and command lines into it is `load`'s work.

Sections that cannot work together are refused by `checks`.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from raydistill.config.checks import check_tree
from raydistill.config.sections import (
    AdapterSection,
    CheckpointSection,
    ClusterSection,
    DataSection,
    EvaluationSection,
    ObjectiveSection,
    QuantSection,
    ResultsSection,
    RolloutSection,
    RunSection,
    Section,
    StudentSection,
    StudySection,
    SyncSection,
    TeacherSection,
    TrainerSection,
    WorldSection,
)


class Config(Section):
    """Everything one run needs. Sections are handed to the actors that need them, and no further."""

    run: RunSection = Field(default_factory=RunSection)
    student: StudentSection = Field(default_factory=StudentSection)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    data: DataSection = Field(default_factory=DataSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    quant: QuantSection = Field(default_factory=QuantSection)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    trainer: TrainerSection = Field(default_factory=TrainerSection)
    sync: SyncSection = Field(default_factory=SyncSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    results: ResultsSection = Field(default_factory=ResultsSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    world: WorldSection = Field(default_factory=WorldSection)
    study: StudySection = Field(default_factory=StudySection)

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_tree(self)
        return self

    @property
    def policy_gap_bound_nats(self) -> float:
        """The bound on the mean policy gap that this run enforces."""
        if self.sync.max_policy_gap_nats is not None:
            return self.sync.max_policy_gap_nats
        return 1e-3 if self.student.dtype == "float32" else 0.05

    @property
    def needs_teacher(self) -> bool:
        """Whether any teacher actor has work to do."""
        return self.objective.distill_weight > 0

    @property
    def needs_rollouts(self) -> bool:
        """Whether any completion is sampled by the student."""
        return self.objective.on_policy_fraction > 0

    @property
    def needs_rollout_pool(self) -> bool:
        """Whether anything is generated: training completions, or answers for exact match."""
        return self.needs_rollouts or (self.data.eval_rows > 0 and self.evaluation.exact_match != "off")

    def evaluates(self, version: int) -> bool:
        """Whether a policy version is evaluated: the first, every `eval_every`th and the last."""
        last = self.trainer.num_steps
        return version in (0, last) or version % self.evaluation.eval_every == 0

    def shows(self, version: int) -> bool:
        """Whether what a policy version writes is recorded: the first and the last."""
        return self.evaluation.shown_rows > 0 and version in (0, self.trainer.num_steps)

    def saves(self, version: int) -> bool:
        """Whether a policy version is checkpointed: those evaluated and every `save_every`th."""
        return self.evaluates(version) or version % self.checkpoint.save_every == 0

    def publishes(self, version: int) -> bool:
        """Whether the trainer sends a version out: every one where the student samples, else those evaluated."""
        return self.needs_rollouts or self.evaluates(version)

    def checks_codes(self, version: int) -> bool:
        """Whether a version's quantized codes are hashed on both sides of the sync."""
        return self.quant.format != "none" and (self.saves(version) or version % self.sync.codes_check_every == 0)
