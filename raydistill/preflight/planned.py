"""The architectures of a config's models, without weights: read off their folders, or off the recipe of a world to come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.config import Config, StudentSection, TeacherSection
from raydistill.errors import ConfigError
from raydistill.worlds import world_folder, world_recipe

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModels:
    """On torch's meta device."""

    student: nn.Module
    teacher: nn.Module | None
    vocab_size: int  # ids that both models have
    note: str | None = None


def planned_models(config: Config) -> PlannedModels:
    """Raises what `check_models` raises; of a world that is not built yet only sizes are known, and only they are checked."""
    from raydistill.models import empty_model
    from raydistill.preflight.checks import check_layers, check_models

    if not _needs_world(config):
        facts = check_models(config)
        assert config.student.model is not None, "check_models refuses that"
        student = empty_model(config.student.model, config.student.trust_remote_code)
        teacher = None
        if config.needs_teacher:
            code, model = config.teacher.trust_remote_code, config.teacher.model or config.student.model
            teacher = empty_model(model, code)
        return PlannedModels(student=student, teacher=teacher, vocab_size=facts.vocab_size)
    from raydistill.demo.pretrain import empty_teacher

    recipe = world_recipe(config)

    def of(side: StudentSection | TeacherSection) -> nn.Module:
        return empty_teacher(recipe) if side.model is None else empty_model(side.model, side.trust_remote_code)

    check_layers(config, of(config.student))
    student, teacher = of(config.student), of(config.teacher)
    return PlannedModels(
        student=student,
        teacher=teacher if config.needs_teacher else None,
        vocab_size=min(_num_ids(student), _num_ids(teacher)),
        note=f"the world {config.world.name!r} is not built yet: its model's sizes are those of its recipe, with at most "
        f"{recipe.vocab_size} ids; training the teacher comes first and is not in the duration",
    )


def _num_ids(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def with_world_model(config: Config) -> Config:
    """The config with the model that its embedded world made earlier, where there is one; building one is not our work."""
    if not _uses_world(config) or _needs_world(config):
        return config
    teacher = str(_teacher_of(config))
    student = config.student.model_copy(update={"model": config.student.model or teacher})
    teaching = config.teacher.model_copy(update={"model": config.teacher.model or teacher})
    return config.model_copy(update={"student": student, "teacher": teaching})


def with_built_world(config: Config) -> Config:
    """The same; ConfigError where the world is not built yet."""
    if _needs_world(config):
        raise ConfigError(
            f"world.name={config.world.name!r} makes its own model, and {_teacher_of(config)} is not there yet: start the "
            "run once (`raydistill demo` or `train`), or give models of your own (--student.model FOLDER "
            "--teacher.model FOLDER)"
        )
    return with_world_model(config)


def _uses_world(config: Config) -> bool:
    return config.world.name != "none" and None in (config.student.model, config.teacher.model)


def _needs_world(config: Config) -> bool:
    return _uses_world(config) and not (_teacher_of(config) / "config.json").is_file()


def _teacher_of(config: Config) -> Path:
    return world_folder(config) / "teacher"
