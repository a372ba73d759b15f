import shutil

import pytest
import torch

from raydistill.errors import QuantError
from raydistill.evaluate.held_out import answer_held_out, score_answers
from raydistill.evaluate.ptq import choose_grid, export_ptq, search_grids
from raydistill.quant.baselines import apply_ptq, ptq_grids
from raydistill.quant.export import load_exported, packed_bytes, read_manifest
from raydistill.tensors import CompletionModel


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_candidate_with_the_lowest_kl_is_chosen_and_the_weights_stay(world, teacher):
    model, before = teacher, weights(teacher)
    answers = answer_held_out(CompletionModel(model), world.examples)
    seen = []
    choice = choose_grid(model, answers, ptq_grids(2, 32), on_grid=lambda fmt, kl: seen.append((fmt, kl)))
    assert len(choice.kl_nats) == 4
    assert choice.kl_nats[choice.best] == min(choice.kl_nats.values()) > 0
    assert dict(seen) == choice.kl_nats
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert choice.rows()[0] == {"format": choice.best.name, "kl_nats": min(choice.kl_nats.values()), "chosen": True}


def test_each_candidate_starts_from_the_full_precision_weights(world, teacher):
    answers = answer_held_out(CompletionModel(teacher), world.examples)
    kl_nats = choose_grid(teacher, answers, ptq_grids(3, 32)).kl_nats
    for fmt, kl in reversed(kl_nats.items()):
        fresh = load_exported(world.teacher)
        apply_ptq(fresh, fmt)
        assert score_answers(CompletionModel(fresh), answers).kl_nats == pytest.approx(kl, rel=1e-5)


def test_the_weights_stay_when_a_grid_does_not_fit(world, teacher):
    before = weights(teacher)
    answers = answer_held_out(CompletionModel(teacher), world.examples[:2])
    with pytest.raises(QuantError, match="group_size=48"):
        choose_grid(teacher, answers, ptq_grids(2, 48))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_more_bits_are_nearer_to_the_teacher_and_the_teacher_may_be_another_model(world):
    examples = world.examples[:8]
    choices = search_grids(world.teacher, [2, 3, 4], 32, examples)
    assert [choice.best.bits for choice in choices.values()] == [2, 3, 4]
    kls = [choice.kl_nats[choice.best] for choice in choices.values()]
    assert kls == sorted(kls, reverse=True)
    far = search_grids(world.teacher, [4], 32, examples, teacher=world.other)[4]
    assert far.kl_nats[far.best] > kls[0]


def test_the_export_is_the_model_that_was_measured(world, tmp_path):
    choice = search_grids(world.teacher, [2], 32, world.examples)[2]
    out = tmp_path / "ptq"
    codes_hash = export_ptq(world.teacher, choice.best, out)
    assert read_manifest(out)["codes_hash"] == codes_hash
    answers = answer_held_out(CompletionModel(load_exported(world.teacher)), world.examples)
    kl = score_answers(CompletionModel(load_exported(out)), answers).kl_nats
    assert kl == pytest.approx(choice.kl_nats[choice.best], rel=1e-5)
    assert packed_bytes(out) < packed_bytes(world.teacher)
    shutil.rmtree(out)
