"""The configuration: `schema` is the tree of `sections`, `load` reads files and command lines; no torch, ray or vllm."""

from raydistill.config.schema import Config
from raydistill.config.sections import (
    AdapterSection,
    ClusterSection,
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
