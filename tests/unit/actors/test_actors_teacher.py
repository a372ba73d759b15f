"""What the teacher says about each completion token, whatever batch it was in."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from raydistill.actors import teacher as teacher_module
from raydistill.actors.kept_answers import KeptAnswers, answer_key
from raydistill.actors.teacher import TeacherActor, TeacherRequest, top_k_with_tail
from raydistill.config import ObjectiveSection, TeacherSection
from raydistill.errors import ModelError, ResourceError
from raydistill.messages import REFERENCE_VERSION, Samples, Scored, StageReport, TeacherDense, TeacherTopK, TokenRows
from raydistill.models import load_causal_lm, memory_to_fill
from raydistill.tensors import CompletionModel

VOCABULARY = 61
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [14, 15], [16] * 9]
COMPLETIONS = [[20, 21, 1], list(range(22, 40)), [], [41], [42, 43, 44, 45]]


def make_samples(rows: list[int], version: int = 4) -> Samples:
    return Samples(
        step=5,
        indices=tuple(rows),
        row_ids=tuple(f"row-{r}" for r in rows),
        prompts=TokenRows.from_rows([PROMPTS[r] for r in rows]),
        completions=TokenRows.from_rows([COMPLETIONS[r] for r in rows]),
        policy_versions=(version,) * len(rows),
        finish_reasons=("stop",) * len(rows),
    )


def ask(
    folder: Path, rows: list[int], batch_tokens: int = 16384, vocab_size: int = VOCABULARY, **objective: object
) -> tuple[StageReport, Scored]:
    return start(folder, batch_tokens).score(make_samples(rows), request(vocab_size, **objective))


def start(folder: Path, batch_tokens: int = 16384, cache_gib: float = 0) -> TeacherActor:
    actor = TeacherActor("teacher-0")
    section = TeacherSection(model=str(folder), dtype="float32", batch_tokens=batch_tokens, cache_gib=cache_gib)
    assert actor.start(section) == "Qwen3ForCausalLM"
    return actor


def request(vocab_size: int = VOCABULARY, **objective: object) -> TeacherRequest:
    return TeacherRequest.of(ObjectiveSection.model_validate(objective), vocab_size)


def whole_logprobs(folder: Path, rows: list[int], temperature: float = 1.0) -> np.ndarray:
    """[N, V] float64 by the model's own forward, one unpadded sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parts = []
    for r in rows:
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[r] + COMPLETIONS[r]])).logits[0].double()
        first = len(PROMPTS[r]) - 1
        parts.append(torch.log_softmax(logits[first : first + len(COMPLETIONS[r])] / temperature, -1))
    return torch.cat(parts).numpy()


def test_the_top_k_and_the_tail_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 200, generator=generator) * 4
    logits[0] = torch.linspace(0, -90, 200)  # so peaked that 1 - sum of the top has no digit left
    exact = torch.log_softmax(logits.double(), -1)
    ids, top, tail = top_k_with_tail(torch.log_softmax(logits, -1), 64)
    order = exact.argsort(-1, descending=True)
    assert (ids.long() == order[:, :64]).all()
    torch.testing.assert_close(top.double(), exact.gather(1, order[:, :64]), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(tail.double(), exact.gather(1, order[:, 64:]).logsumexp(-1), rtol=1e-6, atol=1e-5)
    assert (ids.dtype, top.dtype, tail.dtype) == (torch.int32, torch.float32, torch.float32)
    assert float(tail[0]) < -25  # 1 - sum gives 0 or 6e-8 there, or a negative number


def test_no_token_is_left_for_the_tail_when_k_is_the_vocabulary() -> None:
    ids, top, tail = top_k_with_tail(torch.log_softmax(torch.randn(3, 9), -1), 9)
    assert torch.isneginf(tail).all()
    assert not torch.isnan(top).any()
    assert (ids.sort(-1).values == torch.arange(9)).all()


def test_answers_are_those_of_the_whole_model_in_the_order_of_the_completions(tiny_qwen: Path) -> None:
    rows = [0, 1, 2, 3, 4]
    report, scored = ask(tiny_qwen, rows, top_k=8)
    exact = whole_logprobs(tiny_qwen, rows)
    assert isinstance(scored.target, TeacherTopK)
    np.testing.assert_allclose(scored.target.logprobs_NK, -np.sort(-exact, axis=1)[:, :8], atol=1e-4)
    np.testing.assert_allclose(
        np.take_along_axis(exact, scored.target.ids_NK.astype(int), 1)[:, 0], exact.max(1), atol=1e-5
    )
    left = np.log(np.sort(np.exp(exact), axis=1)[:, :-8].sum(1))
    np.testing.assert_allclose(scored.target.tail_logprob_N, left, atol=1e-4)
    assert scored.samples.indices == (0, 1, 2, 3, 4)
    assert (report.step, report.num_sequences, report.num_tokens) == (5, 5, 26)
    assert report.span is not None
    assert (report.span.stage, report.span.actor) == ("teacher", "teacher-0")


@pytest.mark.parametrize("batch_tokens", [1, 12, 40, 100_000])
def test_the_answer_does_not_depend_on_the_batch(tiny_qwen: Path, batch_tokens: int) -> None:
    rows = [4, 0, 3, 1, 2]
    _, scored = ask(tiny_qwen, rows, batch_tokens, target="dense")
    assert isinstance(scored.target, TeacherDense)
    np.testing.assert_allclose(scored.target.logprobs_NV, whole_logprobs(tiny_qwen, rows), atol=1e-4)


def test_the_answer_does_not_depend_on_the_block_of_rows(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = start(tiny_qwen)
    _, whole = actor.score(make_samples([0, 1]), request(top_k=8))
    monkeypatch.setattr(teacher_module, "LOGITS_ROWS", 4)
    _, cut = actor.score(make_samples([0, 1]), request(top_k=8))
    assert isinstance(whole.target, TeacherTopK)
    assert isinstance(cut.target, TeacherTopK)
    np.testing.assert_allclose(cut.target.logprobs_NK, whole.target.logprobs_NK, atol=1e-5)
    np.testing.assert_array_equal(cut.target.ids_NK, whole.target.ids_NK)


def test_the_padding_of_the_teachers_vocabulary_is_cut_before_the_softmax(tiny_qwen: Path) -> None:
    _, scored = ask(tiny_qwen, [0, 1], vocab_size=50, target="dense")
    assert isinstance(scored.target, TeacherDense)
    assert scored.target.logprobs_NV.shape == (21, 50)
    exact = whole_logprobs(tiny_qwen, [0, 1])[:, :50]
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    np.testing.assert_allclose(scored.target.logprobs_NV, exact, atol=1e-4)
    _, scored = ask(tiny_qwen, [0, 1], vocab_size=50, top_k=64)
    assert isinstance(scored.target, TeacherTopK)
    assert scored.target.ids_NK.shape == (21, 50)  # K is at most the vocabulary
    assert np.isneginf(scored.target.tail_logprob_N).all()
    assert scored.target.is_finite


def test_answers_are_at_the_temperature_of_the_objective(tiny_qwen: Path) -> None:
    _, scored = ask(tiny_qwen, [1, 3], target="dense", temperature=2.5)
    assert isinstance(scored.target, TeacherDense)
    np.testing.assert_allclose(scored.target.logprobs_NV, whole_logprobs(tiny_qwen, [1, 3], 2.5), atol=1e-4)


def test_completions_that_are_all_empty_get_no_answers(tiny_qwen: Path) -> None:
    _, scored = ask(tiny_qwen, [2], top_k=8)
    assert isinstance(scored.target, TeacherTopK)
    assert scored.target.ids_NK.shape == (0, 8)


def test_a_teacher_that_is_held_already_is_not_loaded_again(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = start(tiny_qwen)
    loads: list[object] = []
    load = teacher_module.load_causal_lm
    monkeypatch.setattr(teacher_module, "load_causal_lm", lambda *args: loads.append(args) or load(*args))
    section = TeacherSection(model=str(tiny_qwen), dtype="float32")
    actor.start(section)
    _, scored = actor.score(make_samples([0]), request(50, target="dense"))  # another request needs no other weights
    assert isinstance(scored.target, TeacherDense)
    assert scored.target.logprobs_NV.shape == (3, 50)
    assert loads == []
    actor.start(section.model_copy(update={"dtype": "bfloat16"}))
    assert len(loads) == 1


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "head of its own"])
def test_a_teacher_spread_over_places_answers_as_a_whole_one_does(
    tiny_qwen: Path, tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host and the disk stand for two devices: accelerate moves what lies elsewhere through the same hooks. The tied
    head lies where the embedding does, far from the last layer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32)
    model.config.tie_word_embeddings = tied
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
    model.generation_config = GenerationConfig()
    model.save_pretrained(tmp_path)
    whole_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    size = sum(p.numel() * p.element_size() for p in whole_model.parameters())
    bounds: dict[int | str, int] = {"cpu": int(0.8 * size), "disk": 10 * size}
    monkeypatch.setattr(teacher_module, "memory_to_fill", lambda *_: bounds)
    spread = start(tmp_path)
    assert spread._model is not None
    places = spread._model.model.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert places["lm_head"] == ("cpu" if tied else "disk")
    monkeypatch.setattr(teacher_module, "memory_to_fill", lambda *_: None)
    whole = start(tmp_path)
    one, other = (actor.score(make_samples([0, 1, 2, 3]), request(top_k=8))[1].target for actor in (spread, whole))
    assert isinstance(one, TeacherTopK)
    assert isinstance(other, TeacherTopK)
    np.testing.assert_array_equal(one.ids_NK, other.ids_NK)
    np.testing.assert_array_equal(one.logprobs_NK, other.logprobs_NK)
    np.testing.assert_array_equal(one.tail_logprob_N, other.tail_logprob_N)


def test_a_teacher_that_does_not_fit_its_gpus_is_told_so_and_does_not_go_to_the_disk(tiny_qwen: Path) -> None:
    section = TeacherSection(model=str(tiny_qwen), dtype="float32")
    with pytest.raises(
        ModelError, match=r"does not fit 1 devices .* \(the rest went to disk\); raise teacher.num_gpus"
    ):
        CompletionModel(load_causal_lm(section, "teacher.model", "cpu", {"cpu": 30_000}))


def test_only_a_teacher_of_several_gpus_is_spread_over_them() -> None:
    free = [1000, 2000, 4000]
    assert memory_to_fill(0, []) is None
    assert memory_to_fill(0.5, free) is None
    assert memory_to_fill(1, free) is None
    assert memory_to_fill(2, free) == {0: 850, 1: 1700}
    with pytest.raises(ResourceError, match=r"teacher\.num_gpus=4, but the actor sees 3 GPUs"):
        memory_to_fill(4, free)


def references(rows: list[int]) -> Samples:
    return make_samples(rows, REFERENCE_VERSION)


def same_target(one: Scored, other: Scored) -> bool:
    assert isinstance(one.target, TeacherTopK) and isinstance(other.target, TeacherTopK)
    names = ("ids_NK", "logprobs_NK", "tail_logprob_N")
    return all(np.array_equal(getattr(one.target, name), getattr(other.target, name)) for name in names)


def test_a_row_of_the_data_set_costs_one_forward_whoever_asks_again(tiny_qwen: Path) -> None:
    actor = start(tiny_qwen, cache_gib=1)
    actor.score(references([0, 1, 4]), request(top_k=8))
    report, again = actor.score(references([4, 3, 0]), request(top_k=8))
    assert actor.counts() == {"computed_rows": 4, "kept_rows": 2}
    assert [(m.name, m.value) for m in report.metrics] == [("teacher/kept_fraction", pytest.approx(2 / 3))]
    _, fresh = ask(tiny_qwen, [4, 3, 0], top_k=8)
    np.testing.assert_allclose(again.target.logprobs_NK, fresh.target.logprobs_NK, atol=1e-5)  # type: ignore[union-attr]
    np.testing.assert_array_equal(again.target.ids_NK[:, 0], fresh.target.ids_NK[:, 0])  # type: ignore[union-attr]


def test_another_request_and_what_a_student_wrote_are_computed(tiny_qwen: Path) -> None:
    actor = start(tiny_qwen, cache_gib=1)
    for wanted in (request(top_k=8), request(top_k=4), request(top_k=8, temperature=2.0), request(50, top_k=8)):
        actor.score(references([0]), wanted)
    for _ in range(2):
        actor.score(make_samples([0]), request(top_k=8))  # sampled by a policy: nobody asks for it again
    assert actor.counts() == {"computed_rows": 6, "kept_rows": 0}


def test_without_room_nothing_is_kept_and_nothing_is_said(tiny_qwen: Path) -> None:
    actor = start(tiny_qwen)
    answers = [actor.score(references([0, 1]), request(top_k=8)) for _ in range(2)]
    assert actor.counts() == {"computed_rows": 4, "kept_rows": 0}
    assert answers[1][0].metrics == ()
    assert same_target(answers[0][1], answers[1][1])


def hits(kept: KeptAnswers, rows: Iterable[int], size: int = 60) -> int:
    """Ask for each row, and put it where it was not kept."""
    found = 0
    for row in rows:
        key = str(row).encode()
        found += kept.get(key) is not None
        kept.put(key, (np.zeros(size, np.uint8),))
    return found


def test_rows_that_come_again_in_the_same_order_are_found_where_not_all_have_room() -> None:
    for room, least in ((10, 1.0), (9, 0.8), (5, 0.35)):
        kept = KeptAnswers(limit_bytes=room * 60)
        assert hits(kept, range(10)) == 0
        assert hits(kept, [*range(10)] * 7) >= least * 70
        assert len(kept) == room


def test_rows_that_do_not_come_again_make_room() -> None:
    kept = KeptAnswers(limit_bytes=9 * 60)
    hits(kept, range(100, 109))
    hits(kept, [*range(10)] * 12)
    assert hits(kept, [*range(10)] * 5) >= 0.6 * 50


def test_an_answer_larger_than_all_room_is_not_kept_and_drops_none() -> None:
    kept = KeptAnswers(limit_bytes=130)
    hits(kept, [1, 2])
    kept.put(b"too large", (np.zeros(131, np.uint8),))
    assert kept.get(b"1") is not None and kept.get(b"2") is not None and len(kept) == 2
    for row in range(40):
        hits(kept, [row + 10], size=100)
    assert len(kept) == 1  # of 100 bytes


def test_an_answer_is_that_of_its_tokens_and_its_request() -> None:
    def key(prompt: list[int], completion: list[int], wanted: object = "r") -> bytes:
        return answer_key(wanted, np.array(prompt, np.int32), np.array(completion, np.int64))

    assert key([1, 2], [3]) == key([1, 2], [3])
    others = [key([1], [2, 3]), key([1, 2], [4]), key([1, 2, 3], []), key([1, 2], [3], "s")]
    assert len({key([1, 2], [3]), *others}) == 5
