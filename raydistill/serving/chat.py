"""The verb `raydistill chat`: a small terminal loop over an OpenAI-compatible server, started if none answers.

Answers go to stdout as they are written, everything else to stderr. Only the standard library speaks HTTP here.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raydistill.cli import command_parser, console
from raydistill.errors import RunError, UserError
from raydistill.serving.serve import HOST, PORT, default_name, prepare_folder, split_extra
from raydistill.serving.server import opener, served_models, started_server

ANSWER_TIMEOUT_S = 300.0
SUMMARY = """\
Talk to a model's folder in the terminal. Uses the server that answers on the port, or starts `raydistill serve DIR` and
ends it again. /reset forgets the conversation, Ctrl-D ends it."""
EXAMPLES = """\
examples:
  raydistill chat exports/student
  raydistill chat exports/student --once "What is 17 + 25?"
        one answer on stdout, for scripts
  raydistill chat exports/student --port 8001 -- --max-model-len 4096
        what follows -- goes to vLLM if the server is started
"""


def chat_command(argv: Sequence[str]) -> int:
    """The verb `chat`."""
    own, extra = split_extra(argv)
    arguments = _parser().parse_args(own)
    name = arguments.served_model_name or default_name(arguments.folder)
    with running_server(arguments.folder, arguments.port, name, extra):
        chat = Chat(arguments.port, name, arguments.max_tokens, arguments.temperature)
        if arguments.once is not None:
            _print(chat.ask(arguments.once))
            return 0
        console.print(f"{name} listens; /reset forgets, Ctrl-D ends", style="dim")
        while (text := _read_line()) is not None:
            if text == "/reset":
                chat.reset()
            elif text:
                try:
                    _print(chat.ask(text))
                except KeyboardInterrupt:
                    console.print("(stopped)", style="dim")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("chat", SUMMARY, EXAMPLES, takes_config=False)
    parser.usage = "raydistill chat DIR [--port PORT] [--once TEXT] [switches] [-- VLLM ARGUMENTS]"
    parser.add_argument("folder", type=Path, metavar="DIR", help="a model's folder, or a run's")
    parser.add_argument("--port", type=int, default=PORT, help="default: %(default)s")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the folder's name")
    parser.add_argument("--once", metavar="TEXT", help="print one answer and end")
    parser.add_argument("--max-tokens", type=int, default=512, help="an answer is cut here (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s, always the likeliest")
    return parser


class Chat:
    """One conversation."""

    def __init__(self, port: int, model: str, max_tokens: int, temperature: float) -> None:
        self._port = port
        self._settings = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "stream": True}
        self.reset()

    def reset(self) -> None:
        self._messages: list[dict[str, str]] = []

    def ask(self, text: str) -> Iterator[str]:
        """The answer, piece by piece; it becomes part of the conversation when it is complete."""
        messages = [*self._messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        for event in _events(self._port, "/v1/chat/completions", {**self._settings, "messages": messages}):
            for choice in event.get("choices", []):
                piece = choice.get("delta", {}).get("content") or ""
                pieces.append(piece)
                yield piece
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


@contextmanager
def running_server(folder: Path, port: int, name: str, extra: Sequence[str]) -> Iterator[None]:
    """Around a conversation: a server that has this model. One that was started here ends here."""
    models = served_models(port)
    if models is not None:
        if name not in models:
            raise UserError(
                f"port {port} serves {', '.join(models)}, not {name}; give another --port, or --served-model-name"
            )
        yield
        return
    with started_server(prepare_folder(folder), port, name, extra):
        yield


def _events(port: int, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Server-sent events of one request."""
    request = urllib.request.Request(
        f"http://{HOST}:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with opener.open(request, timeout=ANSWER_TIMEOUT_S) as answer:
            for line in answer:
                data = line.decode().strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        raise RunError(f"the server answered: {event['error'].get('message', event['error'])}")
                    yield event
    except urllib.error.HTTPError as error:
        raise RunError(f"the server refused: {_reason(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise RunError(f"the server on port {port} went away ({error})") from error


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        body = json.loads(text)
        return str(body.get("error", body)["message"])
    return text.strip()[:300] or str(error)


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _read_line() -> str | None:
    """A line of the user's; None at the end of input."""
    try:
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  # line editing and history for input()
            print("> ", end="", file=sys.stderr, flush=True)
        return input().strip()
    except (EOFError, KeyboardInterrupt):
        return None
