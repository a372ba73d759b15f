"""A model under measurement as lm-eval's model: text in, text and log-probabilities out, over any `Answerer`.

Tokenisation, windows and stop texts are those of lm-eval's own Hugging Face model (tested equal to it), so its published
numbers compare; what is computed is our engine's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from raydistill.errors import DataError
from raydistill.evaluate.answerers import Answerer, OnDone, Pair

MAX_NEW_TOKENS = 256  # lm-eval's default for tasks that do not say


class HarnessModel(TemplateLM):
    """Answers lm-eval's three kinds of requests. template: variables of the chat template.

    max_length: input tokens of one sequence at most, as lm-eval counts: the last token of a sequence is no input. on_docs:
    told how many documents are done, those of earlier calls included.
    """

    def __init__(
        self,
        model: Answerer,
        tokenizer: Any,
        template: Mapping[str, Any],
        max_length: int,
        max_new_tokens: int | None = None,
        on_docs: OnDone | None = None,
    ) -> None:
        super().__init__()
        assert max_length < model.max_tokens
        self.tokenizer, self.max_length = tokenizer, max_length
        self._model, self._template, self._max_new_tokens = model, dict(template), max_new_tokens
        self._on_docs, self._docs_done, self._scale = on_docs, 0, 1.0
        self.num_cut = 0  # sequences that lost their beginning, because they were too long

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's request cache, which is not used."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids as this tokenizer makes them; a text that starts with the begin-of-sequence token gets no second one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation with the student's template variables; a template without a system role gets its text
        with the first message of the user."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except TemplateError:
            if len(chat_history) < 2 or chat_history[0]["role"] != "system":
                raise
            first = {"role": "user", "content": f"{chat_history[0]['content']}\n\n{chat_history[1]['content']}"}
            return self._render([first, *chat_history[2:]], add_generation_prompt)

    def _render(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of continuations, after tokenisation by lm-eval."""
        found = self._model.likelihoods([self._fitted(context, rest) for _, context, rest in requests], self._tell)
        return [(one.total, one.is_greedy) for one in found]

    def _fitted(self, context: Sequence[int], rest: Sequence[int]) -> Pair:
        """The pair without the beginning of its context, where it is too long."""
        room = self.max_length + 1 - len(rest)
        if room < 1:
            raise DataError(
                f"an answer of a task has {len(rest)} tokens, more than the {self.max_length} of one sequence; raise "
                "--max-length, or measure a model with more positions"
            )
        self.num_cut += len(context) > room
        return context[-room:], rest

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See lm-eval."""
        return self._counted(requests, lambda: super(HarnessModel, self).loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts: each token once, in windows that see one token of context at least."""
        pairs: list[Pair] = []
        ends = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs += [make_disjoint_window(window) for window in windows]
            ends.append(len(pairs))
        found = self._counted(requests, lambda: self._model.likelihoods(pairs, self._tell), len(pairs))
        starts = [0, *ends[:-1]]
        return [sum(one.total for one in found[start:end]) for start, end in zip(starts, ends, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers, cut at the first of the task's stop texts."""
        groups: dict[str, list[int]] = {}
        for place, (_, settings) in enumerate(request.args for request in requests):
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(place)
        found = [""] * len(requests)
        for key, places in groups.items():
            asked = [requests[place] for place in places]
            texts = self._counted(asked, partial(self._texts, asked, json.loads(key)))
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return found

    def _texts(self, requests: Sequence[Instance], settings: dict[str, Any]) -> list[str]:
        wanted = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        new_tokens = self._max_new_tokens or int(wanted["max_gen_toks"])
        room = self.max_length - new_tokens
        if room < 1:
            raise DataError(
                f"task {requests[0].task_name} generates up to {new_tokens} tokens, which leaves no room for a prompt in "
                f"sequences of {self.max_length}; lower it with --max-new-tokens"
            )
        end = str(self.tokenizer.decode([self.eot_token_id]))
        stop = handle_stop_sequences(wanted["until"], eos=end)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        self.num_cut += sum(len(prompt) > room for prompt in prompts)
        inner = [text for text in stop if text and text != end]  # the end token is known by its id
        answers = self._model.answers([prompt[-room:] for prompt in prompts], new_tokens, inner, self._tell)
        texts = (str(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers)
        return [postprocess_generated_text(text, stop, None) for text in texts]

    def _counted(self, requests: Sequence[Instance], run: Callable[[], Any], num_sequences: int | None = None) -> Any:
        """Run one call; sequences that `_tell` hears of are turned into documents."""
        docs = len({(request.task_name, request.doc_id) for request in requests})
        self._scale = docs / max(1, num_sequences or len(requests))
        found = run()
        self._docs_done += docs
        return found

    def _tell(self, done: int) -> None:
        if self._on_docs is not None:
            self._on_docs(int(self._docs_done + done * self._scale))
