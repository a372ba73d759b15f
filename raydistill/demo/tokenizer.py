"""A byte-level BPE tokenizer with a chat template, trained on the texts at hand.

Two cuts make token ids predictable: every digit and every line break is a token of its own. Nothing merges across
the line break that ends a prompt, so prompt ids followed by completion ids are the ids of the whole conversation.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
START = "<|im_start|>"
END = "<|im_end|>"

# One pass over the text: a line break | a digit | an English ending | a word | marks | other white space.
PIECES = r"\n|\p{N}|'(?:s|t|d|m|ll|re|ve)\b| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]"

# No line break after END: the assistant's message ends with the very token that sampling stops at.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '" + START + "' + message['role'] + '\\n' + message['content'] + '" + END + "' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + START + "assistant\\n' -}}{%- endif -%}"
)

Message = dict[str, str]
TokenRow = tuple[list[int], list[int]]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts` with at most `vocab_size` entries; fewer where the texts hold no more merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(_with_roles(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _with_roles(texts: Iterable[str]) -> Iterator[str]:
    """The role names of the template ride along, so that each becomes one token."""
    for text in texts:
        yield text
        yield "user"
        yield "assistant"


def encode_chats(tokenizer: PreTrainedTokenizerFast, chats: Sequence[Sequence[Message]]) -> list[TokenRow]:
    """(prompt ids, completion ids) of each conversation; the completion is its last message and its EOS."""
    prompts = tokenizer.apply_chat_template(
        [list(chat[:-1]) for chat in chats], tokenize=False, add_generation_prompt=True
    )
    completions = [chat[-1]["content"] + END for chat in chats]
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    pairs = zip(encode(prompts, add_special_tokens=False), encode(completions, add_special_tokens=False), strict=True)
    return [(prompt.ids, completion.ids) for prompt, completion in pairs]


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the files that `AutoTokenizer.from_pretrained(folder)` reads."""
    tokenizer.save_pretrained(str(folder))
