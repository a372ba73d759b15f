"""Labels: the one that the model finds most likely after the prompt, end token included."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raydistill.data.rows import Message, Row
from raydistill.errors import DataError
from raydistill.evaluate.answerers import HfAnswerer
from raydistill.evaluate.classify import Classification, labels_of
from raydistill.evaluate.rows import file_section

SST2 = Path(__file__).parents[4] / "shared" / "data" / "sst2" / "dev.tsv"


def rows_of(pairs):
    return [Row(f"r{n}", (Message("user", text), Message("assistant", label))) for n, (text, label) in enumerate(pairs)]


def by_hand(model, tokenizer, text, labels):
    """The label with the highest log-probability, each in a float64 pass of its own."""
    totals = []
    for label in labels:
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        first = len(tokenizer.encode(prompt, add_special_tokens=False))
        ids = torch.tensor([tokenizer.encode(prompt + label + "<|im_end|>", add_special_tokens=False)])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1)
        totals.append(float(logprobs.gather(1, ids[0, first:, None]).sum()))
    return labels[int(np.argmax(totals))]


def check(world, model, pairs):
    measurement = Classification(rows_of(pairs), world.tokenizer, file_section(256), [world.tokenizer.eos_token_id])
    found = measurement.measure(HfAnswerer(model, world.tokenizer, [2], 256))
    labels = labels_of(rows_of(pairs))
    model = model.double()
    hits = [by_hand(model, world.tokenizer, text, labels) == label for text, label in pairs]
    rows = found.rows["accuracy"]
    assert rows.values_R.tolist() == [float(hit) for hit in hits]
    assert rows.row_ids == tuple(f"r{n}" for n in range(len(pairs)))
    share = np.mean(hits)
    assert found.measures["accuracy"]["value"] == pytest.approx(share)
    assert found.measures["accuracy"]["se"] == pytest.approx((share * (1 - share) / len(pairs)) ** 0.5)
    assert measurement.num_sequences == len(pairs) * len(labels)
    return hits


def test_the_most_likely_label_is_chosen_and_counted_as_by_hand(world, other):
    texts = [f"{n} and {n + 1} make" for n in range(12)]
    hits = check(world, other, [(text, ("yes", "no", "yes, but 12")[n % 3]) for n, text in enumerate(texts)])
    assert 0 < sum(hits) < len(hits), "else it proves little"


@pytest.mark.skipif(not SST2.exists(), reason=f"needs {SST2}")
def test_sentences_of_sst2_are_classified_as_by_hand(world, other):
    lines = [line.rsplit("\t", 1) for line in SST2.read_text(encoding="utf-8").splitlines()[:40]]
    pairs = [(f"{text[:80]}\nSentiment:", ("negative", "positive")[int(label)]) for text, label in lines]
    assert len({label for _, label in pairs}) == 2
    check(world, other, pairs)


def test_answers_that_are_no_labels_are_refused():
    assert labels_of(rows_of([("a", "yes"), ("b", "no"), ("c", "yes")])) == ("no", "yes")
    with pytest.raises(DataError, match="all of them are 'yes'; give rows with every label"):
        labels_of(rows_of([("a", "yes"), ("b", "yes")]))
    with pytest.raises(DataError, match=r"80 rows have 80 different answers \(first '0'\), so they are no labels"):
        labels_of(rows_of([("a", str(n)) for n in range(80)]))
    assert len(labels_of(rows_of([("a", str(n % 40)) for n in range(80)]))) == 40
    assert len(labels_of(rows_of([("a", str(n)) for n in range(8)]))) == 8
    with pytest.raises(DataError, match="needs rows with an answer"):
        labels_of([Row("r", (Message("user", json.dumps({})),))])
