"""The filter of `--where`: `quant.format = "int2" and trainer.learning_rate > 1e-4`.

    condition [and condition ...]        condition: NAME  = != < <= > >=  VALUE

A value is a number, true, false, none (not set), or text, which needs quotes only if it holds spaces or signs. A list
equals each value it holds. A run that lacks the field satisfies `!=` and `= none` alone. Text is ordered by its letters,
which orders dates: `started >= 2026-01-31`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raydistill.errors import UserError
from raydistill.results.names import Field, Names
from raydistill.results.runs import RunRow

_TOKEN = re.compile(
    r"""\s*(?:(?P<operator><=|>=|!=|==|=|<|>)|"(?P<double>(?:[^"\\]|\\.)*)"|'(?P<single>(?:[^'\\]|\\.)*)'"""
    r"""|(?P<word>[^\s<>=!"']+))"""
)
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OPERATORS = "=, !=, <, <=, > or >="
_WORDS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    text: str
    is_operator: bool = False
    is_quoted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One comparison of a field with a value."""

    name: str
    operator: str
    text: str  # the value as written, without its quotes
    value: bool | float | str | None

    def holds(self, field: Field, run: RunRow) -> bool:
        """Whether a run satisfies it."""
        actual = field.of(run)
        if self.operator == "=":
            return self._equals(actual)
        if self.operator == "!=":
            return not self._equals(actual)
        if actual is None:
            return False
        if _is_number(actual) and not _is_number(self.value):
            raise UserError(f"{field.label} is a number and {self.text!r} is none; compare it with a number")
        if _is_number(actual) or (isinstance(actual, str) and not isinstance(self.value, bool)):
            return _ORDER[self.operator](actual, self.value if _is_number(actual) else self.text)
        raise UserError(f"{field.label} has no order ({actual!r}); use = or !=")

    def _equals(self, actual: Any) -> bool:
        if isinstance(actual, (list, tuple)):
            return any(self._equals(item) for item in actual)
        if _is_number(actual):
            return _is_number(number := _value(self.text)) and actual == number
        if isinstance(actual, str):
            return actual == self.text
        return actual is _value(self.text)


def matching(runs: Sequence[RunRow], where: str | None) -> list[RunRow]:
    """The runs that satisfy a filter; all of them without one."""
    if where is None:
        return list(runs)
    conditions = parse(where)
    names = Names(runs)
    found = [(names.find(condition.name), condition) for condition in conditions] if runs else []
    return [run for run in runs if all(condition.holds(field, run) for field, condition in found)]


def parse(where: str) -> list[Condition]:
    """The conditions of a filter; UserError says what is wrong with it and where."""
    tokens = _tokens(where)
    conditions = []
    while True:
        match tokens[:3]:
            case [name, sign, value] if not name.is_operator and sign.is_operator and not value.is_operator:
                conditions.append(_condition(name, sign, value))
            case [name, sign, *_] if not name.is_operator and sign.is_operator:
                raise _wrong(where, f"{name.text} {sign.text} needs a value behind it")
            case [name, *_] if not name.is_operator:
                raise _wrong(where, f"behind {name.text!r} comes {_OPERATORS}")
            case _:
                raise _wrong(where, f"a condition reads NAME OPERATOR VALUE, with {_OPERATORS}")
        tokens = tokens[3:]
        if not tokens:
            return conditions
        if tokens[0].is_quoted or tokens[0].text.lower() != "and":
            way_out = "only `and` joins conditions" if tokens[0].text.lower() == "or" else "quote text with spaces"
            raise _wrong(where, f"expected `and` before {tokens[0].text!r}; {way_out}")
        tokens = tokens[1:]


def _condition(name: _Token, sign: _Token, value: _Token) -> Condition:
    plain = value.text if value.is_quoted else _value(value.text)
    return Condition(name=name.text, operator=sign.text.replace("==", "="), text=value.text, value=plain)


def _tokens(where: str) -> list[_Token]:
    found, place, end = [], 0, len(where.rstrip())
    while place < end:
        match = _TOKEN.match(where, place)
        if match is None:
            rest = where[place:].lstrip()
            why = "has no end" if rest[0] in "\"'" else "means nothing here"
            raise _wrong(where, f"{rest!r} {why}")
        quoted = match["double"] if match["double"] is not None else match["single"]
        if quoted is not None:
            found.append(_Token(text=re.sub(r"\\(.)", r"\1", quoted), is_quoted=True))
        else:
            found.append(_Token(text=match["operator"] or match["word"], is_operator=bool(match["operator"])))
        place = match.end()
    return found


def _value(text: str) -> bool | float | str | None:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return float(text)
    except ValueError:
        return text


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong(where: str, what: str) -> UserError:
    return UserError(
        f"cannot read --where {where!r}: {what}; for example --where 'quant.format = \"int2\" and learning_rate > 1e-4'"
    )
