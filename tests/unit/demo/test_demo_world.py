"""Worlds are built once, found again, rebuilt when the recipe changes or a build was cut short."""

import json
from pathlib import Path

import pytest
from rich.console import Console

import raydistill.demo.world as world_module
from raydistill.demo.pretrain import TeacherRecipe
from raydistill.demo.world import World, prepare_stories, prepare_text
from raydistill.errors import UserError

TINY = TeacherRecipe(
    hidden_size=32, num_layers=1, num_heads=1, num_key_value_heads=1, mlp_size=32, num_steps=2, batch_size=4
)


def build(folder: Path, **changes: object) -> World:
    settings: dict[str, object] = {"recipe": TINY, "num_train": 40, "num_validation": 4, "num_test": 4}
    return prepare_stories(folder, **(settings | changes))  # type: ignore[arg-type]


def test_a_second_call_finds_the_world_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path / "world")
    monkeypatch.setattr(world_module, "train_language_model", None)  # calling it would fail
    second = build(tmp_path / "world")
    assert (first.cached, second.cached) == (False, True)
    assert second.report == first.report
    assert (second.teacher_folder / "model.safetensors").exists()
    assert second.train_path.exists()


@pytest.mark.parametrize("change", [{"num_train": 41}, {"seed": 1}, {"recipe": TeacherRecipe(num_steps=3)}])
def test_other_settings_mean_another_fingerprint(
    tmp_path: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "world")

    class TrainedAgainError(Exception):
        pass

    def note(*_: object) -> None:
        raise TrainedAgainError

    monkeypatch.setattr(world_module, "train_language_model", note)
    with pytest.raises(TrainedAgainError):
        build(tmp_path / "world", **change)


def test_a_build_that_dies_leaves_no_world_and_the_next_call_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(world_module, "train_language_model", die)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "world")
    assert not (tmp_path / "world").exists()
    assert build(tmp_path / "world").cached is False
    assert not (tmp_path / ".world.building").exists()


def test_a_damaged_world_is_built_again(tmp_path: Path) -> None:
    world = build(tmp_path / "world")
    world.test_path.unlink()
    assert build(tmp_path / "world").cached is False
    (tmp_path / "world" / "world.json").write_text("{")
    assert build(tmp_path / "world").cached is False


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="choose another folder"):
        build(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_progress_reaches_the_callback_and_a_plain_log(tmp_path: Path) -> None:
    steps: list[int] = []
    log = Console(force_terminal=False, width=120, record=True, quiet=False)
    build(tmp_path / "world", progress=lambda step, loss: steps.append(step), console=log)
    assert steps == [1, 2]
    assert "step 2/2" in log.export_text()


def question_file(path: Path, count: int, name: str) -> Path:
    rows = [
        {"question": f"{name} has {n} shells and finds 2. How many?", "answer": f"{n}+2={n + 2}\n#### {n + 2}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_question_answers_become_a_world_with_validation_rows_split_off(tmp_path: Path) -> None:
    train, test = question_file(tmp_path / "train.jsonl", 150, "Ada"), question_file(tmp_path / "test.jsonl", 5, "Ben")
    world = prepare_text("question_answers", tmp_path / "world", train, test, recipe=TINY)
    counts = [len(path.read_text().splitlines()) for path in (world.train_path, world.validation_path, world.test_path)]
    assert counts[2] == 5
    assert counts[0] + counts[1] == 150
    assert counts[1] > 0
    assert prepare_text("question_answers", tmp_path / "world", train, test, recipe=TINY).cached
    question_file(train, 151, "Ada")
    assert not prepare_text("question_answers", tmp_path / "world", train, test, recipe=TINY).cached


def test_a_missing_question_file_is_a_user_error_that_names_it(tmp_path: Path) -> None:
    present = question_file(tmp_path / "train.jsonl", 3, "Ada")
    with pytest.raises(UserError, match=r"no question file at .*absent\.jsonl.*fetch"):
        prepare_text("question_answers", tmp_path / "world", present, tmp_path / "absent.jsonl")


def test_a_malformed_question_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"question": "q"}\n')
    with pytest.raises(UserError, match="line 2"):
        prepare_text("question_answers", tmp_path / "world", path, path)


def test_plain_text_becomes_a_world_of_passages_and_continuations(tmp_path: Path) -> None:
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("".join(f" = Heading {n} = \n{' '.join(f'w{n}x{i}' for i in range(50))}\n" for n in range(60)))
    test.write_text(f"{' '.join(f'v{i}' for i in range(96))} {' '.join(f'u{i}' for i in range(60))} .\n")
    world = prepare_text("text", tmp_path / "world", train, test, recipe=TINY)
    first, second = (json.loads(line)["messages"] for line in world.test_path.read_text().splitlines())
    assert first[0] == {"role": "user", "content": " ".join(f"v{i}" for i in range(24))}
    assert first[1] == {"role": "assistant", "content": " " + " ".join(f"v{i}" for i in range(24, 96))}
    assert second[0]["content"].startswith("u0 u1 ")
    assert second[1]["content"].endswith(" u59 .")
    counts = [len(path.read_text().splitlines()) for path in (world.train_path, world.validation_path)]
    assert sum(counts) == 60
    assert min(counts) > 0


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"too short\n", "no paragraph of 48 words"), (b"\xff\xfe\x00", "not UTF-8"), (None, "no text file")],
)
def test_a_text_file_without_passages_is_a_user_error(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepare_text("text", tmp_path / "world", path, path)
