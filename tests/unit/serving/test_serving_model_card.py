"""README.md of an export: the numbers that a reader decides by, from the run's record."""

from dataclasses import replace
from pathlib import Path

from recorded_pages import summary_rows, write_run

from raydistill.quant.formats import WeightFormat
from raydistill.recovery.run_storage import BEST
from raydistill.results.record import RunRecord
from raydistill.results.tables import COMPARISON, SummaryRow, comparison_json
from raydistill.serving.export import _compared
from raydistill.serving.model_card import CardFacts, model_card

FACTS = CardFacts(
    name="student",
    run="20260101-000000-student",
    teacher="Qwen/Qwen3-4B",
    base="Qwen/Qwen3-4B",
    fmt=WeightFormat(bits=2, group_size=32, symmetric=False, scale="absmax"),
    layout="dequantized",
    dtype="bfloat16",
    adapter="merged",
    version=150,
    num_steps=150,
    codes_hash="c0de",
    data_fingerprint=None,
    template={},
    size_bytes=1000,
    metrics={"evaluate/kl_nats": 0.004, "evaluate/exact_match": 0.97, "evaluate/exact_match_se": 0.01},
    before={"evaluate/kl_nats": 0.1, "evaluate/exact_match": 0.52, "evaluate/exact_match_se": 0.02},
    compared=(),
    raydistill="0.1.0",
)


def rows_of(card: str, title: str) -> list[str]:
    """Lines of a section's tables."""
    section = card.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")]


def test_a_card_sets_the_student_beside_its_teacher_and_plain_rounding() -> None:
    assert rows_of(model_card(FACTS), "Quality on held-out rows") == [
        "| | KL to the teacher (nats/token) | exact match |",
        "|---|---:|---:|",
        "| teacher | 0 | - |",
        "| before training (step 0: plain rounding to int2-g32-asym-absmax) | 0.1 | 52.0 ± 2.0 % |",
        "| **this student (step 150)** | 0.004 | 97.0 ± 1.0 % |",
    ]
    without = model_card(replace(FACTS, before={}, metrics={"evaluate/perplexity": 1.5}))
    assert rows_of(without, "Quality on held-out rows")[2:] == ["| **this student (step 150)** | 1.5 |"]
    assert "was not evaluated in its run" in model_card(replace(FACTS, metrics={}))


def test_the_table_of_a_study_stands_in_the_card_of_its_student() -> None:
    rows = [
        SummaryRow(name="teacher", role="teacher", kl_nats=0.0, bytes=10, exact_match=0.99, num_rows=512),
        SummaryRow(name="rtn-int2", role="ptq", kl_nats=0.1, bytes=2, exact_match=0.5, num_rows=512),
        SummaryRow(name="student", role="student", kl_nats=0.004, bytes=2, exact_match=0.97, num_rows=512),
    ]
    card = model_card(replace(FACTS, compared=rows))
    assert "On 512 test rows" in card
    for name in ("| teacher | teacher | 99.0%", "| rtn-int2 | ptq | 50.0%", "| **student** | **student** | **97.0%**"):
        assert name in card


def test_only_the_checkpoint_that_a_study_measured_has_its_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "20260101-000000-student", num_steps=6, comparison=False)
    assert _compared(run, 6) == [], "no study"
    control = SummaryRow(name="gold-ce", role="control", kl_nats=0.01, bytes=2)
    with RunRecord(tmp_path / f"20260101-000000-{COMPARISON}") as record:
        record.start(name="study", config={}, provenance={}, seed=0)
        record.table(COMPARISON, comparison_json([*summary_rows(), control]))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / BEST).write_text('{"version": 6}')
    assert _compared(run, 6) == summary_rows()
    assert _compared(run, 0) == []


def test_weights_in_float32_are_served_in_float32() -> None:
    assert "`vllm serve FOLDER --dtype float32`" in model_card(replace(FACTS, dtype="float32"))
    assert "`vllm serve FOLDER`" in model_card(FACTS)
