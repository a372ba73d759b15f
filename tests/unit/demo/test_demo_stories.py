"""The story generator: deterministic, arithmetically right, no prompt in two splits."""

import itertools
import json
from pathlib import Path

from raydistill.demo.answers import final_number
from raydistill.demo.stories import Story, generate_stories, split_of, write_splits


def take(split: str, count: int, seed: int = 0) -> list[Story]:
    return list(itertools.islice(generate_stories(split, seed), count))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_stories_and_another_seed_others() -> None:
    assert take("train", 50, seed=3) == take("train", 50, seed=3)
    assert take("train", 50, seed=3) != take("train", 50, seed=4)


def test_a_longer_file_starts_with_the_shorter_one() -> None:
    assert take("test", 30)[:10] == take("test", 10)


def test_no_prompt_crosses_splits_even_between_seeds() -> None:
    prompts = {
        split: {story.prompt for seed in (0, 1) for story in take(split, 300, seed)}
        for split in ("train", "validation", "test")
    }
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]
    assert all(split_of(prompt) == split for split, found in prompts.items() for prompt in found)


def test_prompts_within_a_split_are_distinct() -> None:
    prompts = [story.prompt for story in take("train", 3000)]
    assert len(set(prompts)) == len(prompts)


def test_every_line_of_an_answer_is_true_and_the_last_total_is_the_final_number() -> None:
    for story in take("train", 1000):
        *chain, marked = story.answer.splitlines()
        for line in chain:
            left, right = line.split("=")
            assert eval(left) == int(right), story.answer
            assert 1 <= int(right) <= 99
        assert final_number(marked) == chain[-1].split("=")[1]


def test_the_chain_uses_the_numbers_of_the_prompt() -> None:
    for story in take("train", 300):
        words = story.prompt.replace(".", " ").replace("?", " ").split()
        told = {word for word in words if word.isdigit()} | {"2" for word in words if word == "doubles"}
        told |= {"3" for word in words if word == "triples"}
        made = {line.split("=")[1] for line in story.answer.splitlines() if "=" in line}
        for line in story.answer.splitlines()[:-1]:
            for operand in line.split("=")[0].replace("+", " ").replace("-", " ").replace("*", " ").split():
                assert operand in told | made, story


def test_written_files_are_chat_rows_of_the_wanted_counts(tmp_path: Path) -> None:
    paths = write_splits(tmp_path, num_train=20, num_validation=5, num_test=7, seed=1)
    counts = [len(path.read_text().splitlines()) for path in (paths.train, paths.validation, paths.test)]
    assert counts == [20, 5, 7]
    row = json.loads(paths.train.read_text().splitlines()[0])
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert not list(tmp_path.glob("*.partial"))
