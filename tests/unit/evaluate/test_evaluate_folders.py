import math

import pytest

from raydistill.demo.tokenizer import train_tokenizer
from raydistill.errors import DataError, ModelError, UserError
from raydistill.evaluate.folders import Target, evaluate_folders
from raydistill.evaluate.ptq import export_ptq
from raydistill.quant.export import export_live, packed_bytes
from raydistill.quant.formats import WeightFormat
from raydistill.quant.student import LoraSettings, prepare_student

from .conftest import make_model, save

INT4 = WeightFormat(bits=4, group_size=32, symmetric=False, scale="searched")


@pytest.fixture(scope="module")
def ptq(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "int4"
    export_ptq(world.teacher, INT4, folder)
    return folder


def test_the_table_has_the_teacher_first_with_a_measured_kl_of_zero(world, ptq):
    told = []
    rows = evaluate_folders(
        [Target("int4", ptq), Target("other", world.other)],
        world.teacher,
        world.examples,
        world.tokenizer,
        progress=lambda *step: told.append(step),
    )
    assert [(row.name, row.role) for row in rows] == [("teacher", "teacher"), ("int4", "ptq"), ("other", "control")]
    teacher, int4, other = rows
    assert teacher.kl_nats == pytest.approx(0.0, abs=1e-7)
    assert 0 < int4.kl_nats < other.kl_nats
    assert all(math.isfinite(row.perplexity) and row.exact_match is None for row in rows)
    assert all(0 < row.perplexity_se < row.perplexity for row in rows)
    assert (teacher.bytes, int4.bytes) == (packed_bytes(world.teacher), packed_bytes(ptq))
    assert int4.extras == {"format": INT4.name}
    assert [what for what, _, _ in told if what.startswith("int4")]
    counts = [done / total for _, done, total in told]
    assert counts == sorted(counts)
    assert counts[-1] == 1


def test_the_bytes_of_a_served_adapter_count(world, ptq, tmp_path):
    student = make_model(world.tokenizer, 1)
    prepare_student(student, INT4, "served", LoraSettings(rank=4, alpha=8, targets=("q_proj",)))
    folder = tmp_path / "served"
    export_live(folder, student, world.teacher, {})
    bare, served = evaluate_folders(
        [Target("ptq", ptq), Target("served", folder)], world.teacher, world.examples[:4], world.tokenizer
    )[1:]
    assert served.role == "student"
    assert served.bytes > bare.bytes
    assert served.kl_nats == pytest.approx(bare.kl_nats, rel=1e-4)  # a fresh adapter adds nothing


def test_exact_match_is_measured_for_every_row_of_the_table(world, parrot, tmp_path):
    folder = save(parrot, world.tokenizer, tmp_path / "parrot")
    rows = evaluate_folders(
        [Target("parrot", folder)], world.teacher, world.examples, world.tokenizer, "final_number", max_new_tokens=8
    )
    sevens = sum(world.tokenizer.decode(e.reference_ids).endswith("#### 7<|im_end|>") for e in world.examples)
    share = sevens / len(world.examples)
    assert rows[1].exact_match == share
    assert rows[1].exact_match_se == pytest.approx(math.sqrt(share * (1 - share) / len(world.examples)))
    assert [row.num_rows for row in rows] == [len(world.examples)] * 2


def test_a_target_that_is_the_teacher_names_its_row(world):
    rows = evaluate_folders([Target("fp32", world.teacher)], world.teacher, world.examples[:2], world.tokenizer)
    assert [(row.name, row.role) for row in rows] == [("fp32", "teacher")]


def test_a_target_that_is_called_as_the_teachers_row_is_refused(world):
    """Worlds call their teacher's folder so."""
    of_another_world = Target("teacher", world.other)
    with pytest.raises(UserError, match=r"other is called 'teacher', .* name it apart, as in first=.*other"):
        evaluate_folders([of_another_world], world.teacher, world.examples[:2], world.tokenizer)
    named = [of_another_world, Target("mine", world.teacher)]
    rows = evaluate_folders(named, world.teacher, world.examples[:2], world.tokenizer)
    assert [(row.name, row.role) for row in rows] == [("mine", "teacher"), ("teacher", "control")]
    alone = evaluate_folders([of_another_world], None, world.examples[:2], world.tokenizer)
    assert [row.name for row in alone] == ["teacher"]


def test_another_tokenizer_is_refused(world, tmp_path):
    foreign = train_tokenizer(["zebra quagga zebra quagga okapi okapi"] * 9, vocab_size=len(world.tokenizer))
    folder = save(make_model(world.tokenizer, 5), foreign, tmp_path / "foreign")
    with pytest.raises(ModelError, match=r"the rows' tokenizer and foreign .* disagree on .* token ids, first at id"):
        evaluate_folders([Target("foreign", folder)], world.teacher, world.examples, world.tokenizer)


def test_a_smaller_vocabulary_is_refused(world, tmp_path):
    folder = tmp_path / "small"
    make_model(world.tokenizer, 5, vocab_size=40).save_pretrained(folder)
    with pytest.raises(ModelError, match="has a vocabulary of 40, but the rows use id"):
        evaluate_folders([Target("small", folder)], world.teacher, world.examples, world.tokenizer)


def test_padding_of_the_vocabulary_is_no_mismatch(world, tmp_path):
    padded = make_model(world.tokenizer, 5, vocab_size=len(world.tokenizer) + 16)
    folder = save(padded, world.tokenizer, tmp_path / "padded")
    row = evaluate_folders([Target("padded", folder)], world.teacher, world.examples[:4], world.tokenizer)[1]
    assert row.kl_nats > 0


def test_exact_match_without_final_numbers_is_refused(world):
    from raydistill.data.encode import Example

    blank = [Example(e.row_id, e.prompt_ids, e.reference_ids[:2]) for e in world.examples]
    with pytest.raises(DataError, match="mark none"):
        evaluate_folders([], world.teacher, blank, world.tokenizer, "final_number")
