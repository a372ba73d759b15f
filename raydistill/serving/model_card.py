"""README.md of an exported folder: what the student is, how good it is, how to load it; from the run's record.

Plain text from plain facts. Folders of this machine are shown by their last name only, so that a card can be published.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raydistill.quant.formats import Layout, WeightFormat
from raydistill.results.names import STANDARD_ERROR
from raydistill.results.tables import SummaryRow, comparison_markdown, format_bytes

METRICS = {
    "evaluate/kl_nats": "KL to the teacher (nats/token)",
    "evaluate/perplexity": "perplexity of the references",
    "evaluate/exact_match": "exact match",
}
LAYOUT_TEXT: dict[Layout, str] = {
    "packed": "raydistill's dense codes",
    "compressed-tensors": "compressed-tensors, pack-quantized W4A16",
    "dequantized": "plain weights with the quantized values",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What the card says."""

    name: str
    run: str
    teacher: str
    base: str  # the model that the student was made from
    fmt: WeightFormat | None
    layout: Layout
    dtype: str | None
    adapter: str  # "merged", "served" (beside the weights) or "none" (all weights were trained)
    version: int
    num_steps: int
    codes_hash: str
    data_fingerprint: str | None
    template: Mapping[str, object]  # variables of the chat template
    size_bytes: int
    metrics: Mapping[str, float]  # of this checkpoint, in its run
    before: Mapping[str, float]  # of version 0
    compared: Sequence[SummaryRow]  # teacher, plain quantization and this student, where the run was part of a study
    raydistill: str


def model_card(facts: CardFacts) -> str:
    """The whole README.md."""
    return "\n".join([*_front_matter(facts), *_description(facts), *_quality(facts), *_loading(facts)]) + "\n"


def public_name(model: str) -> str:
    """A hub id as it is, a folder by its last name."""
    return model if is_hub_id(model) else Path(model).name


def is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def _front_matter(facts: CardFacts) -> Iterator[str]:
    yield "---"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    if is_hub_id(facts.base):
        yield f"base_model: {json.dumps(facts.base)}"
        yield f"base_model_relation: {'adapter' if facts.adapter == 'served' else 'quantized'}"
    width = [] if facts.fmt is None else [facts.fmt.family]
    layout = ["compressed-tensors"] if facts.layout == "compressed-tensors" else []
    yield "tags:"
    yield from (f"- {tag}" for tag in ("raydistill", "distillation", *width, *layout))
    yield "---"


def _description(facts: CardFacts) -> Iterator[str]:
    weights = "unquantized" if facts.fmt is None else facts.fmt.name
    adapter = {"merged": ", adapter merged", "served": ", adapter beside them in `adapter/`"}.get(facts.adapter, "")
    yield f"\n# {facts.name}\n"
    yield f"A student of **{public_name(facts.teacher)}**, distilled with raydistill on text that it wrote itself or was given."
    rows = {
        "made from": public_name(facts.base),
        "teacher": public_name(facts.teacher),
        "weights": f"{weights}{adapter}",
        "stored as": LAYOUT_TEXT[facts.layout],
        "computes in": facts.dtype or "the dtype of config.json",
        "size": format_bytes(facts.size_bytes),
        "checkpoint": f"step {facts.version} of {facts.num_steps}, run {facts.run}",
        "hash of the codes": f"`{facts.codes_hash}`",
        "data fingerprint": f"`{facts.data_fingerprint}`" if facts.data_fingerprint else "not recorded",
        "chat template's variables": f"`{json.dumps(facts.template)}`" if facts.template else "none",
        "raydistill": facts.raydistill,
    }
    yield "\n| | |\n|---|---|"
    yield from (f"| {name} | {value} |" for name, value in rows.items())


def _quality(facts: CardFacts) -> Iterator[str]:
    yield "\n## Quality on held-out rows\n"
    if not facts.metrics:
        yield "This checkpoint was not evaluated in its run."
    else:
        yield from _held_out(facts)
    if facts.compared:
        num_rows = next((row.num_rows for row in facts.compared if row.num_rows is not None), None)
        yield f"\nOn {'test rows' if num_rows is None else f'{num_rows:,} test rows'}, each model as it is shipped:\n"
        yield comparison_markdown(facts.compared).rstrip("\n")


def _held_out(facts: CardFacts) -> Iterator[str]:
    """The run's own evaluations: of the teacher the record says no more than that its KL to itself is 0."""
    names = [name for name in facts.metrics if not name.endswith(STANDARD_ERROR)]
    yield "| | " + " | ".join(METRICS.get(name, name.removeprefix("evaluate/")) for name in names) + " |"
    yield "|---|" + "---:|" * len(names)
    rows = {f"**this student (step {facts.version})**": facts.metrics}
    if facts.before and facts.version != 0:
        plain = "its base, not trained" if facts.fmt is None else f"plain rounding to {facts.fmt.name}"
        rows = {f"before training (step 0: {plain})": facts.before} | rows
    if "evaluate/kl_nats" in names:
        rows = {"teacher": {"evaluate/kl_nats": 0.0}} | rows
    for title, metrics in rows.items():
        yield f"| {title} | " + " | ".join(_value(name, metrics) for name in names) + " |"


def _value(name: str, metrics: Mapping[str, float]) -> str:
    if name not in metrics:
        return "-"
    value, error = metrics[name], metrics.get(name + STANDARD_ERROR)
    if name == "evaluate/exact_match":
        return f"{100 * value:.1f}{'' if error is None else f' ± {100 * error:.1f}'} %"
    return f"{value:.4g}"


def _loading(facts: CardFacts) -> Iterator[str]:
    yield "\n## Loading it\n"
    is_served = facts.adapter == "served"
    if facts.layout == "packed":
        yield "```python\nfrom raydistill.quant.export import load_exported\n"
        yield "model = load_exported(FOLDER)  # a transformers model, the adapter included\n```"
        yield "\n`raydistill serve FOLDER` writes plain weights beside it and serves those with vLLM."
        return
    unpacks = is_served and facts.layout == "compressed-tensors"  # PEFT cannot wrap packed weights
    more = ", CompressedTensorsConfig" if unpacks else ""
    yield f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer{more}\n"
    if unpacks:
        yield "unpacked = CompressedTensorsConfig(dequantize=True)  # an adapter is put beside plain weights"
        yield 'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto", quantization_config=unpacked)'
    else:
        yield 'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")'
    if is_served:
        yield 'model.load_adapter(f"{FOLDER}/adapter")  # part of the student: without it, it is another model'
    yield "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```\n"
    switches = " --enable-lora --lora-modules student=FOLDER/adapter" if is_served else ""
    if facts.layout == "dequantized" and facts.dtype == "float32":
        switches += " --dtype float32"  # left alone, vLLM rounds float32 to bfloat16
    yield f"With vLLM: `raydistill serve FOLDER`, or `vllm serve FOLDER{switches}`."
    if facts.layout == "compressed-tensors" and facts.fmt is not None and facts.fmt.scale_dtype != "bfloat16":
        yield (
            f"\nScales are stored in {facts.fmt.scale_dtype} as they were trained. An engine that computes in bfloat16 "
            "rounds them to bfloat16; the codes stay the same."
        )
