"""Fills in a config that names an embedded world: the student's and teacher's folder and the data files it makes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from raydistill.config import Config
from raydistill.errors import ConfigError

if TYPE_CHECKING:
    from raydistill.demo.pretrain import TeacherRecipe
    from raydistill.demo.world import World


def world_folder(config: Config) -> Path:
    """Where the world of this config is cached."""
    return (config.world.folder or config.run.output / "worlds" / config.world.name).absolute()


def resolve_world(config: Config, console: Console) -> Config:
    """Build (or find) the world and return the config with model and data paths set; unchanged without a world.

    The student starts from the teacher's own weights, and fields that the user set himself stay.
    """
    return config if config.world.name == "none" else with_world(config, build_world(config, console))


def build_world(config: Config, console: Console) -> World:
    """Make the world that the config names, or find it where an earlier run left it."""
    from raydistill.demo.world import prepare_stories, prepare_text

    name, folder = config.world.name, world_folder(config)
    if name == "stories":
        return prepare_stories(folder, world_recipe(config), console=console)
    train, test = config.world.train_path, config.world.test_path
    assert name != "none" and train is not None and test is not None  # config/checks.py asks for them
    return prepare_text(name, folder, train, test, world_recipe(config), console=console)


def with_world(config: Config, world: World) -> Config:
    """The config with the world's folders and files in every field that is not set."""
    teacher = str(world.teacher_folder)
    data = {"path": config.data.path or world.train_path, "eval_path": config.data.eval_path or world.validation_path}
    return config.model_copy(
        update={
            "student": config.student.model_copy(update={"model": config.student.model or teacher}),
            "teacher": config.teacher.model_copy(update={"model": config.teacher.model or teacher}),
            "data": config.data.model_copy(update=data),
        }
    )


def world_recipe(config: Config) -> TeacherRecipe:
    """Size and schedule of the teacher that the config's world has, or will have."""
    from raydistill.demo.world import LANGUAGE_RECIPE, STORIES_RECIPE

    base = STORIES_RECIPE if config.world.name == "stories" else LANGUAGE_RECIPE
    known = {f.name for f in fields(base)}
    for name in config.world.recipe:
        if name not in known:
            raise ConfigError(f"world.recipe has no setting {name!r}; it has {', '.join(sorted(known))}")
    return replace(base, **cast("dict[str, Any]", config.world.recipe))
