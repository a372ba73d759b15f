"""The verb `raydistill serve`: vLLM's OpenAI-compatible server on a folder, with the settings that its weights need.

This process becomes the server (`exec`), so that signals and the exit code are the server's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.actors.vllm_folders import engine_dtype, is_cpu, manifest_of, runnable_folder, takes_int4
from raydistill.actors.vllm_settings import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT, allocated_rank
from raydistill.cli import command_parser, console
from raydistill.errors import ModelError, UserError
from raydistill.evaluate.run_defaults import EXPORT_FOLDER
from raydistill.evaluate.targets import is_adapter, without_export
from raydistill.quant.formats import ADAPTER_FOLDER, TEMPLATE
from raydistill.results.record_lines import RECORD_FILE

HOST, PORT = "127.0.0.1", 8000
SUMMARY = """\
Serve a model's folder at http://127.0.0.1:PORT/v1 with vLLM: an export of raydistill in any layout, a run's folder (its
export), or any transformers folder. Ends with Ctrl-C.

vLLM does not know raydistill's packed layout, and has no 4-bit kernel for x86 processors without AVX-512: plain weights are
then written beside the folder first, and used again the next time. An adapter of a student trained in served mode is merged
into those in float32; in 16 bits, where rounding would take part of it away, vLLM serves it beside them (LoRA). int4 weights
run in bfloat16 on a CPU, plain weights of an export in the dtype of the student.

Chats are rendered with the template variables that the student was trained with, such as enable_thinking=false."""
EXAMPLES = """\
examples:
  raydistill serve exports/student
        at http://127.0.0.1:8000/v1 under the name "student"
  raydistill serve exports/student --port 8001 --served-model-name mine -- --max-model-len 4096
        what follows -- goes to vLLM as it is
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "student", "prompt": "Hello", "max_tokens": 32}'
  raydistill chat exports/student
        talk to it
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server process that is to be started."""

    arguments: list[str]
    environment: dict[str, str]


def serve_command(argv: Sequence[str], execute: Callable[[str, list[str], dict[str, str]], Any] = os.execve) -> int:
    """The verb `serve`; does not return once the server runs."""
    own, extra = split_extra(argv)
    arguments = _parser().parse_args(own)
    check_model(arguments.folder)
    check_vllm()
    check_port(arguments.port)
    folder = prepare_folder(arguments.folder)
    name = arguments.served_model_name or default_name(arguments.folder)
    server = plan_server(folder, arguments.port, name, extra, is_cpu())
    console.print(f"serving {folder} as {name!r} at http://{HOST}:{arguments.port}/v1 (Ctrl-C ends it)", soft_wrap=True)
    sys.stdout.flush()
    execute(server.arguments[0], server.arguments, server.environment)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve", SUMMARY, EXAMPLES, takes_config=False)
    parser.usage = "raydistill serve DIR [--port PORT] [--served-model-name NAME] [-- VLLM ARGUMENTS]"
    parser.add_argument("folder", type=Path, metavar="DIR", help="a model's folder, or a run's")
    parser.add_argument("--port", type=int, default=PORT, help="default: %(default)s")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the folder's name")
    return parser


def split_extra(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(our arguments, those after --)."""
    arguments = list(argv)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def default_name(folder: Path) -> str:
    """What a model is called when nothing else is said."""
    return folder.absolute().resolve().name


def check_vllm() -> None:
    """UserError where vLLM is not installed; imports nothing."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed here; install the pinned packages (make setup), or load the folder in transformers"
        )


def check_port(port: int) -> None:
    """UserError where somebody listens on the port: vLLM would say so only after it has loaded the model."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended a minute ago is no obstacle
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"port {port} on {HOST} cannot be used ({reason}); give another --port") from error


def prepare_folder(folder: Path) -> Path:
    """`servable_folder` for this machine."""
    return servable_folder(folder, takes_int4=takes_int4())


def check_model(folder: Path) -> Path:
    """The model in a folder: the folder itself, or a run's export; ModelError where there is none. Reads no weights."""
    if (folder / RECORD_FILE).is_file():
        if not (folder / EXPORT_FOLDER).is_dir():
            raise without_export(folder)
        folder = folder / EXPORT_FOLDER
    if not folder.is_dir():
        raise ModelError(f"{folder} does not exist; give an export, a model or a run's folder")
    if is_adapter(folder):
        raise ModelError(f"{folder} is an adapter without its base; give the folder above it, which holds both")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model: it holds no config.json; give an export, a model or a run's folder")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} is no model: it holds no .safetensors file; export it again")
    if (manifest_of(folder) or {}).get("lora") is not None and not (folder / ADAPTER_FOLDER).is_dir():
        raise ModelError(f"{folder} is a base without its adapter: {ADAPTER_FOLDER}/ is missing; export the run again")
    return folder


def servable_folder(folder: Path, takes_int4: bool) -> Path:
    """A folder that vLLM runs here: the one given, a run's export, or plain weights written beside it."""
    return runnable_folder(check_model(folder), takes_int4)


def plan_server(folder: Path, port: int, name: str, extra: Sequence[str], is_cpu: bool) -> Server:
    """Command line and environment of the server. What the caller's environment sets stays as it is."""
    manifest = manifest_of(folder)
    lora = (manifest or {}).get("lora")
    options = {"model": str(folder), "host": HOST, "port": str(port), "served-model-name": name}
    if lora is not None:
        options["served-model-name"] = f"{name}-base"  # the student is base and adapter together
        options |= {
            "lora-modules": f"{name}={folder / ADAPTER_FOLDER}",
            "max-lora-rank": str(allocated_rank(lora["rank"])),
        }
    template = (manifest or {}).get("extra", {}).get(TEMPLATE)
    if template:  # what a request says itself comes first
        options["default-chat-template-kwargs"] = json.dumps(template)
    environment = {**ENGINE_ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # the server has a process of its own for the engine anyway
    if is_cpu:
        environment |= CPU_ENGINE_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        options |= {"dtype": engine_dtype(folder, is_cpu=True), "block-size": "32"}
    elif (manifest or {}).get("as") == "dequantized":
        options["dtype"] = engine_dtype(folder, is_cpu=False)
    given = {argument.split("=")[0] for argument in extra}
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for option, value in options.items():
        if f"--{option}" not in given:
            arguments += [f"--{option}", value]
    flags = (["--enable-lora"] if lora is not None else []) + (["--enforce-eager"] if is_cpu else [])
    arguments += [flag for flag in flags if flag not in given]
    return Server(arguments=[*arguments, *extra], environment={**environment, **os.environ})
