"""The configuration: `schema` is the tree, `load` reads files and command lines into it; no torch, ray or vllm."""

from raydistill.config.schema import (
    AdapterSection,
    ClusterSection,
    Config,
    DataSection,
    EvaluationSection,
    ObjectiveSection,
    QuantSection,
    ResultsSection,
    RolloutSection,
    RunSection,
    StudentSection,
    StudySection,
    SyncSection,
    TeacherSection,
    TrainerSection,
    WorldSection,
)

__all__ = [
    "AdapterSection",
    "ClusterSection",
    "Config",
    "DataSection",
    "EvaluationSection",
    "ObjectiveSection",
    "QuantSection",
    "ResultsSection",
    "RolloutSection",
    "RunSection",
    "StudentSection",
    "StudySection",
    "SyncSection",
    "TeacherSection",
    "TrainerSection",
    "WorldSection",
]
