"""Reads the final number out of a worked answer, so that two answers can be compared exactly.

A number may carry a sign, a currency mark, thousands commas and decimals. `final_number` trusts only the marker
`####`; `last_number` takes whatever number comes last. Both return a normal form: `$1,200.50` and `1200.5` are equal.
"""

import re

_NUMBER = r"[-+]?\$?[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\$?[-+]?\.\d+"
_MARKED = re.compile(r"####\s*(" + _NUMBER + r")(?![\d,]*\d)")
_ANY = re.compile(r"(?<![\w.])(?:" + _NUMBER + r")")


def final_number(text: str) -> str | None:
    """The number after the last `####`, or None: the strict reading."""
    found = _MARKED.findall(text)
    return normalise(found[-1]) if found else None


def last_number(text: str) -> str | None:
    """The number after the last `####`, else the last number anywhere: the flexible reading."""
    marked = final_number(text)
    if marked is not None:
        return marked
    found = _ANY.findall(text)
    return normalise(found[-1]) if found else None


def normalise(number: str) -> str:
    """Plain digits: no currency mark, commas, plus sign, leading or trailing zeros; `-0` is `0`."""
    bare = number.replace("$", "").replace(",", "")
    sign = "-" if "-" in bare else ""
    whole, _, decimals = bare.lstrip("+-").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return value if value == "0" else sign + value


def exact_match(prediction_text: str, reference_text: str) -> bool:
    """Whether the prediction marks the same final number as the reference; an unmarked prediction is wrong."""
    predicted, wanted = final_number(prediction_text), final_number(reference_text)
    return predicted is not None and predicted == wanted


def flexible_match(prediction_text: str, reference_text: str) -> bool:
    """The same where a prediction that marks no number counts by its last one."""
    predicted, wanted = last_number(prediction_text), final_number(reference_text)
    return predicted is not None and predicted == wanted
