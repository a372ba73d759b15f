"""Training the tiny teacher: the same function as the library's model, deterministic, and it learns."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from raydistill.demo.batches import LossOn, collate, make_batches
from raydistill.demo.fast_forward import counted_logits
from raydistill.demo.muon import Muon
from raydistill.demo.pretrain import TeacherRecipe, mean_loss, new_model, schedule, train_language_model
from raydistill.demo.stories import generate_stories
from raydistill.demo.tokenizer import TokenRow, encode_chats, train_tokenizer

TINY = TeacherRecipe(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    mlp_size=64,
    num_steps=20,
    batch_size=8,
    warmup_steps=3,
)


@pytest.fixture(scope="module")
def tokenizer_and_rows() -> tuple[PreTrainedTokenizerFast, list[TokenRow]]:
    stories = list(itertools.islice(generate_stories("train", 0), 400))
    tokenizer = train_tokenizer([text for s in stories for text in (s.prompt, s.answer)], 512)
    return tokenizer, encode_chats(tokenizer, [story.chat_row()["messages"] for story in stories])


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_the_fast_forward_agrees_with_the_library_in_loss_and_gradients(
    tokenizer_and_rows: tuple[PreTrainedTokenizerFast, list[TokenRow]], loss_on: LossOn
) -> None:
    tokenizer, rows = tokenizer_and_rows
    model = new_model(dataclasses.replace(TINY, num_heads=4, num_key_value_heads=2), tokenizer)
    with torch.no_grad():  # norms at 1 would hide a norm that is applied twice or not at all
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    batch = collate(rows[:6], max_length=512, loss_on=loss_on)
    mean_loss(model, batch).backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    total, count = torch.zeros(()), 0
    for prompt, completion in rows[:6]:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        first = len(prompt) if loss_on == "completion" else 1
        targets = torch.tensor((prompt + completion)[first:])
        total = total + torch.nn.functional.cross_entropy(logits[first - 1 : -1], targets, reduction="sum")
        count += len(targets)
    (total / count).backward()
    torch.testing.assert_close(mean_loss(model, batch), total / count, rtol=1e-5, atol=1e-6)
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)


def test_counted_logits_leave_out_the_padding(
    tokenizer_and_rows: tuple[PreTrainedTokenizerFast, list[TokenRow]],
) -> None:
    tokenizer, rows = tokenizer_and_rows
    model, batch = new_model(TINY, tokenizer), collate(rows[:5], 512, "completion")
    logits = counted_logits(model, batch.input_ids_BT, batch.counted_BC, batch.keep_N)
    assert logits.shape == (sum(len(completion) for _, completion in rows[:5]), len(tokenizer))


def test_our_muon_makes_the_updates_of_torchs() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in [(24, 24), (48, 24), (24, 48), (24, 48)]]
    ours = [torch.nn.Parameter(start.clone()) for start in starts]
    theirs = [torch.nn.Parameter(start.clone()) for start in starts]
    mine = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.01)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original")
    for _ in range(3):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        mine.step()
        reference.step()
    for left, right, start in zip(ours, theirs, starts, strict=True):
        moved = (right - start).norm()
        assert (left - right).norm() < 0.02 * moved  # the reference rounds to bfloat16


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_twenty_steps_reduce_the_loss_and_repeat_bit_for_bit(
    tmp_path: Path, tokenizer_and_rows: tuple[PreTrainedTokenizerFast, list[TokenRow]]
) -> None:
    tokenizer, rows = tokenizer_and_rows
    seen: list[tuple[int, float]] = []
    report = train_language_model(rows, TINY, tmp_path / "a", tokenizer, lambda step, loss: seen.append((step, loss)))
    train_language_model(rows, TINY, tmp_path / "b", tokenizer)
    assert [step for step, _ in seen] == list(range(1, 21))
    assert seen[-1][1] < 0.6 * seen[0][1]
    assert report.num_steps == 20
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_saved_folder_loads_with_its_tokenizer_and_stops_at_eos(
    tmp_path: Path, tokenizer_and_rows: tuple[PreTrainedTokenizerFast, list[TokenRow]]
) -> None:
    tokenizer, rows = tokenizer_and_rows
    train_language_model(rows, dataclasses.replace(TINY, num_steps=2), tmp_path / "teacher", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == loaded.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == loaded.pad_token_id
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_the_schedule_warms_up_holds_and_falls_to_zero() -> None:
    recipe = TeacherRecipe(num_steps=100, warmup_steps=10, decay_fraction=0.5)
    factors = [schedule(step, recipe) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)


def test_an_epoch_of_batches_holds_every_row_once(
    tokenizer_and_rows: tuple[PreTrainedTokenizerFast, list[TokenRow]],
) -> None:
    _, rows = tokenizer_and_rows
    batches = itertools.islice(make_batches(rows, 16, 512, "completion", seed=0), 25)
    assert sum(len(batch.targets_N) for batch in batches) == sum(len(completion) for _, completion in rows)


def test_rows_beyond_the_length_limit_are_cut_or_left_out() -> None:
    rows = [([1] * 6, [2] * 6), ([1] * 20, [2])]
    batch = next(make_batches(rows, 2, 8, "completion", seed=0))
    assert batch.input_ids_BT.shape == (1, 7)
    assert batch.targets_N.tolist() == [2, 2]
    with pytest.raises(ValueError, match="within 8 tokens"):
        next(make_batches(rows[1:], 2, 8, "completion", seed=0))
