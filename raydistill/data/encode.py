"""Turns rows into token ids with the model's own chat template.

The prompt is everything up to where the assistant starts to write its last message, with earlier turns as context; the
reference is that last message, up to and including the first stop token, so it ends exactly where a sampled completion
would. A tokenizer without a chat template gets plain text: the messages joined by line breaks, one line break before the
completion, EOS after it.

A row whose text would not reach the model as it stands is refused: a message that the template leaves out (a role it does
not know), a completion with a thinking block after a prompt that has closed it, or without one where the prompt opens it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from raydistill.config import DataSection
from raydistill.data.rows import Message, Row
from raydistill.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_CALL = 1024  # bounds the texts held twice (prompt and full) at any time
THINK_START, THINK_END = "<think>", "</think>"
PLACEHOLDER = "\u2983completion\u2984"  # rare characters: no template holds them
# Arguments of apply_chat_template that say what it returns; as template variables they would break the rendering.
RESERVED_VARIABLES = frozenset(
    ["conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding"]
).union(
    ["continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"],
    ["return_assistant_tokens_mask"],
)


class _RefusedError(Exception):
    """Why the chat template cannot express a row."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row as token ids."""

    row_id: str
    prompt_ids: np.ndarray  # int32
    reference_ids: np.ndarray  # int32, ends with a stop token unless cut; empty where the row has no reference

    @property
    def has_reference(self) -> bool:
        return self.reference_ids.size > 0

    @property
    def num_tokens(self) -> int:
        return int(self.prompt_ids.size + self.reference_ids.size)

    def cut(self, max_length: int) -> Example:
        """The same example with its reference shortened to `max_length` tokens in all; itself if it fits."""
        if self.num_tokens <= max_length:
            return self
        return Example(self.row_id, self.prompt_ids, self.reference_ids[: max_length - self.prompt_ids.size])


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, section: DataSection, *, stop_ids: Sequence[int] = ()
) -> tuple[Example, ...]:
    """Token ids of each row, in order.

    A row that the chat template cannot express (see the module's first lines; roles out of order, no system message
    allowed) is an error, or left out with `section.on_bad_row = "skip"`. stop_ids: ids besides EOS at which the model stops.
    """
    encoder = _Encoder(tokenizer, section, stop_ids)
    examples: list[Example] = []
    for start in range(0, len(rows), ROWS_PER_CALL):
        examples.extend(encoder.encode(rows[start : start + ROWS_PER_CALL]))
    return tuple(examples)


def num_known_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids from 0 that the tokenizer knows. Models round their vocabulary up: rows from there on are padding, which no text
    holds and no trained model predicts."""
    return max(tokenizer.get_vocab().values()) + 1


def require_references(examples: Sequence[Example]) -> None:
    """Raise DataError if an example has no reference completion."""
    without = [example.row_id for example in examples if not example.has_reference]
    if without:
        raise DataError(
            f"objective.on_policy_fraction < 1 needs reference completions, {len(without)} of {len(examples)} rows "
            f"have none (first {without[0]}); give each row an answer or set objective.on_policy_fraction to 1"
        )


class _Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, section: DataSection, stop_ids: Sequence[int]) -> None:
        clash = sorted(RESERVED_VARIABLES & section.template.keys())
        if clash:
            raise ConfigError(f"data.template.{clash[0]} is an argument of the renderer, not a variable; remove it")
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no EOS token, so completions would never end; set its eos_token")
        self._tokenizer = tokenizer
        self._section = section
        self._eos_id = int(tokenizer.eos_token_id)
        self._stop_ids = frozenset((self._eos_id, *stop_ids))
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._is_chat = tokenizer.chat_template is not None
        self._plain_prefix = "" if self._is_chat else self._bos()

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        rendered = self._render_rows(rows)
        prompts = self._tokenize([prompt for _, prompt, _ in rendered])
        fulls = iter(self._tokenize([full for _, _, full in rendered if full is not None]))
        examples = []
        for (row, prompt, full), prompt_ids in zip(rendered, prompts, strict=True):
            try:
                reference = [] if full is None else self._reference_ids(row, prompt, full, prompt_ids, next(fulls))
            except _RefusedError as reason:
                self._refuse(row, reason)
                continue
            examples.append(Example(row.row_id, np.array(prompt_ids, np.int32), np.array(reference, np.int32)))
        return examples

    def _reference_ids(self, row: Row, prompt: str, full: str, prompt_ids: list[int], full_ids: list[int]) -> list[int]:
        """The ids that follow the prompt's, cut at the first stop token."""
        if full_ids[: len(prompt_ids)] == prompt_ids:
            ids = full_ids[len(prompt_ids) :]
        elif full.startswith(prompt):  # a token reaches over the border: the model continues from the prompt's ids
            ids = self._tokenize([full[len(prompt) :]])[0]
        else:
            ids = self._tokenize([self._continuation(row, prompt, full)])[0]
        for place, token in enumerate(ids):
            if token in self._stop_ids:
                return ids[: place + 1]
        return [*self._without_blank_tail(ids), self._eos_id]

    def _continuation(self, row: Row, prompt: str, full: str) -> str:
        """Completion text where the generation prompt holds what the full text does not, such as a thinking block.

        The end of the turn is what the template writes after a placeholder in the completion's place.
        """
        assert row.reference is not None
        content = row.reference.content.strip()
        text = self._render([(*row.prompt, Message("assistant", PLACEHOLDER))], add_generation_prompt=False)[0]
        before, found, end_of_turn = text.rpartition(PLACEHOLDER)
        if not found:
            raise _RefusedError("the chat template does not write the assistant's message as it is")
        if prompt.rstrip().endswith(THINK_START):
            content = content.removeprefix(THINK_START).lstrip("\n")
            if THINK_END not in content:
                raise _RefusedError(
                    f"the prompt ends with an open {THINK_START}, and its completion has no {THINK_END}. Give completions "
                    "with their thinking, or set a variable of the template that turns it off, such as "
                    "data.template.enable_thinking=false"
                )
        elif full not in (before + content + end_of_turn, before + row.reference.content + end_of_turn):
            raise _RefusedError(
                f"the completion does not follow its prompt, which ends with {prompt[-40:]!r}: the chat template writes it "
                "in another way there. A completion with a thinking block needs data.template.enable_thinking=true"
            )
        return content + end_of_turn

    def _without_blank_tail(self, ids: list[int]) -> list[int]:
        """Drop white space after a template's last special token; white space of the text itself stays."""
        end = len(ids)
        while end and not str(self._tokenizer.decode([ids[end - 1]], skip_special_tokens=False)).strip():
            end -= 1
        return ids[:end] if end and ids[end - 1] in self._special_ids else ids

    def _render_rows(self, rows: Sequence[Row]) -> list[tuple[Row, str, str | None]]:
        """(row, prompt text, full text or None without a reference); a refused row is named or left out."""
        try:
            prompts = self._render([row.prompt for row in rows], add_generation_prompt=True)
            answered = [row.messages for row in rows if row.reference is not None]
            fulls = iter(self._render(answered, add_generation_prompt=False))
            for row, prompt in zip(rows, prompts, strict=True) if self._is_chat else ():
                self._check_complete(row, prompt)
        except (TemplateError, _RefusedError) as error:
            if len(rows) > 1:
                return [one for row in rows for one in self._render_rows([row])]
            self._refuse(rows[0], error)
            return []
        return [
            (row, prompt, next(fulls) if row.reference else None) for row, prompt in zip(rows, prompts, strict=True)
        ]

    def _check_complete(self, row: Row, prompt: str) -> None:
        """Templates pass over roles that they do not know. An assistant's earlier turns may lose their thinking."""
        for place, message in enumerate(row.prompt):
            if message.role == "assistant" or message.content.strip() in prompt:
                continue
            probe = [*row.prompt[:place], Message(message.role, PLACEHOLDER), *row.prompt[place + 1 :]]
            if PLACEHOLDER not in self._render([probe], add_generation_prompt=True)[0]:  # else it is there, quoted
                raise _RefusedError(f"it leaves out messages[{place}], whose role is {message.role!r}")

    def _refuse(self, row: Row, reason: Exception) -> None:
        """DataError, unless such rows are left out."""
        if self._section.on_bad_row == "skip":
            return
        roles, text = [m.role for m in row.messages], str(reason).rstrip(".")
        is_system = "system" in roles and "system" in text.lower()
        hint = "; a system text that a model has no role for goes into the first user message" if is_system else ""
        raise DataError(
            f"row {row.row_id}: the model's chat template does not fit it: {text}. Correct the row "
            f"(roles {', '.join(roles)}{hint}), or skip such rows with data.on_bad_row='skip'"
        ) from reason

    def _render(self, chats: Sequence[Sequence[Message]], add_generation_prompt: bool) -> list[str]:
        if not self._is_chat:
            end = "\n" if add_generation_prompt else ""
            return [self._plain_prefix + "\n".join(m.content for m in chat) + end for chat in chats]
        if not chats:
            return []
        variables: dict[str, Any] = {**self._section.template}
        # Text, not ids: what the tokenizing call returns differs between transformers versions.
        texts = self._tokenizer.apply_chat_template(
            [[{"role": m.role, "content": m.content} for m in chat] for chat in chats],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return [str(text) for text in texts]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _bos(self) -> str:
        """The BOS text, if this tokenizer puts one before plain text; chat templates write their own."""
        bos_id = self._tokenizer.bos_token_id
        starts = list(self._tokenizer("a")["input_ids"])
        return str(self._tokenizer.bos_token) if bos_id is not None and starts[:1] == [bos_id] else ""
