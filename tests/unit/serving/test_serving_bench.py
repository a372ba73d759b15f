"""The verb bench without vLLM: what is measured in which order, what the figures are, what is refused; servers that end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.demo.tokenizer import train_tokenizer
from raydistill.evaluate.ptq import export_ptq
from raydistill.evaluate.run_defaults import source_of
from raydistill.quant.formats import WeightFormat
from raydistill.serving import bench, bench_inputs
from raydistill.serving.bench import Server, bench_command
from raydistill.serving.load import Load
from raydistill.serving.server import started_server

ROOT = Path(__file__).parents[3]
INT2 = WeightFormat(bits=2, group_size=32, symmetric=False, scale="absmax")
ROWS = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(12)]
ROOM = {"eval_rows": 4, "max_length": 64, "min_prompt_room": 1, "min_completion": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, rows, and an int2 export that knows both."""
    place = tmp_path_factory.mktemp("bench")
    tokenizer = train_tokenizer([row["question"] + row["answer"] for row in ROWS], vocab_size=300)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 96}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads, tie_word_embeddings=True))
    model.save_pretrained(place / "teacher")
    tokenizer.save_pretrained(place / "teacher")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    export_ptq(place / "teacher", INT2, place / "student")
    config = Config.model_validate(
        {
            "student": {"model": str(place / "teacher")},
            "data": {"path": str(place / "rows.jsonl")} | ROOM,
            "rollout": {"max_new_tokens": 16},
        }
    )
    start = {"name": "first", "config": config.model_dump(mode="json")}
    (place / "student" / "raydistill-source.json").write_text(json.dumps(source_of(start)))
    return place


@pytest.fixture
def passes(monkeypatch: Any) -> list[tuple[str, Any]]:
    """In place of vLLM: servers that start at once, and answers that take a known time. What happened, in order."""
    happened: list[tuple[str, Any]] = []

    @contextmanager
    def serving(contender: Any, plan: Any) -> Iterator[Server]:
        happened.append(("start", contender.name))
        yield Server(port=1, pid=os.getpid(), gpu_bytes_before=0)
        happened.append(("end", contender.name))

    def send(generator: Any, port: int, model: str, prompts: Any, new_tokens: int, concurrency: int) -> Load:
        happened.append((model, concurrency))
        seconds = 2.0 if model == "student" else 4.0
        number = len(prompts)
        return Load(
            seconds=seconds / concurrency,
            first_token_s=[0.5] * number,
            request_s=[0.5 + 0.1 * (new_tokens - 1)] * number,
            num_tokens=[new_tokens] * number,
        )

    monkeypatch.setattr(bench, "serving", serving)
    monkeypatch.setattr("raydistill.serving.load.load_generator", lambda: None)
    monkeypatch.setattr("raydistill.serving.load.send", send)
    monkeypatch.setattr(bench_inputs, "fits_side_by_side", lambda sizes: True)
    return happened


def test_rounds_alternate_between_two_servers_that_stay_up(place: Path, passes: list[Any], capsys: Any) -> None:
    argv = [str(place / "student"), "--rounds", "2", "--requests", "6", "--new-tokens", "11", "--json"]
    assert main_with_errors(bench_command, argv) == 0
    student, teacher = [("student", 1), ("student", 8)], [("teacher", 1), ("teacher", 8)]
    warm = [("student", 8), *student, ("teacher", 8), *teacher]
    assert passes == [
        *[("start", "student"), ("start", "teacher")],
        *[*warm, *teacher, *student],
        *[("end", "teacher"), ("end", "student")],
    ]
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["settings"]["requests"] == 6 and found["settings"]["prompts"] == "held out by run first"
    assert found["settings"]["dtype"] == "float32"
    rows = {(row["model"], row["concurrency"]): row for row in found["rows"]}
    assert list(rows) == [("student", 1), ("student", 8), ("teacher", 1), ("teacher", 8)]
    row = rows["student", 8]
    assert row["tokens_per_s"] == row["tokens_per_s_min"] == row["tokens_per_s_max"] == 6 * 11 / 0.25
    assert (row["first_token_p50_ms"], row["first_token_p95_ms"]) == (500, 500)
    assert row["per_token_p50_ms"] == pytest.approx(100)
    assert row["request_p50_ms"] == pytest.approx(1500)
    assert 0 < row["weight_bytes"] < row["served_weight_bytes"] and row["memory_bytes"] > 1e7
    assert len(found["notes"]) == 3 and any(
        "is packed: what runs here is a plain copy" in note for note in found["notes"]
    )
    assert "is packed: what runs here is a plain copy" in captured.err


def test_servers_take_turns_where_memory_is_short(place: Path, passes: list[Any], capsys: Any) -> None:
    argv = [str(place / "student"), "--rounds", "2", "--requests", "2", "--concurrency", "1", "--one-at-a-time"]
    assert main_with_errors(bench_command, argv) == 0
    names = ["student", "teacher", "teacher", "student"]
    assert passes == [event for name in names for event in (("start", name), (name, 1), (name, 1), ("end", name))]
    out = capsys.readouterr().out
    assert "tokens/s" in out and "first token p50 (ms)" in out and out.count("student") == 1


def test_a_busy_machine_is_noticed() -> None:
    rows = [{"tokens_per_s_min": 100, "tokens_per_s_max": high} for high in (110, 120)]
    assert bench.unsteady(rows) is None
    rows.append({"tokens_per_s_min": 40, "tokens_per_s_max": 100})
    assert "differ by up to 2.5 times" in str(bench.unsteady(rows))


def test_prompts_come_from_a_file_or_are_built_in(place: Path, passes: list[Any], capsys: Any) -> None:
    (place / "prompts.jsonl").write_text('{"prompt": "What is 1 plus 1?"}\n')
    argv = [str(place / "student"), "--rounds", "1", "--requests", "3", "--new-tokens", "4", "--json"]
    assert main_with_errors(bench_command, [*argv, "--prompts", str(place / "prompts.jsonl")]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["prompts"] == str(place / "prompts.jsonl") and settings["prompt_tokens"] % 3 == 0
    plain = [str(place / "teacher"), "--teacher", str(place / "teacher"), *argv[1:]]
    assert main_with_errors(bench_command, plain) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["prompts"] == "built-in questions"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["nowhere"], "nowhere does not exist; give an export"),
        (["{place}"], "holds no config.json"),
        (["{place}/teacher"], "does not say what its teacher is; give --teacher FOLDER"),
        (["{place}/student", "--teacher", "no/such-model"], "neither a folder nor a hub id"),
        (["{place}/student", "--prompts", "{place}/none.jsonl"], "none.jsonl does not exist"),
        (["{place}/student", "--new-tokens", "90"], "leaves room for --new-tokens 90 in the models' 96 positions"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(place, passes, capsys, argv, complaint) -> None:
    assert main_with_errors(bench_command, [text.format(place=place) for text in argv]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and complaint in errors[0]
    assert passes == []


def test_vllm_that_is_not_installed_is_one_line(place: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("raydistill.serving.serve.importlib.util.find_spec", lambda name: None)
    assert main_with_errors(bench_command, [str(place / "student")]) == 2
    assert capsys.readouterr().err.startswith("error: vLLM is not installed here; ")


FAKE_SERVER = """
import http.server, json, subprocess, sys
port, name = int(sys.argv[sys.argv.index("--port") + 1]), sys.argv[sys.argv.index("--served-model-name") + 1]
if name == "broken":
    sys.exit("the engine is on fire")
child = subprocess.Popen(["sleep", "300"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": f"child {child.pid}"}]}).encode())
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
HOLD_TWO = """
import sys, time
from pathlib import Path
from raydistill.cli import main_with_errors
from raydistill.serving import server
server.SERVE = (sys.executable, "-S", {script!r})
def command(argv):
    with server.started_server(Path("a"), {ports[0]}, "a", []) as one:
        with server.started_server(Path("b"), {ports[1]}, "b", []) as two:
            print(one, two, *server.served_models({ports[0]}), flush=True)
            time.sleep(300)
sys.exit(main_with_errors(command))
"""


@pytest.fixture
def fake_server(tmp_path: Path, monkeypatch: Any) -> Path:
    script = tmp_path / "fake_server.py"
    script.write_text(FAKE_SERVER)
    monkeypatch.setattr("raydistill.serving.server.SERVE", (sys.executable, "-S", str(script)))
    return script


def free_ports(number: int) -> list[int]:
    import socket

    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_no_server_outlives_the_command(fake_server: Path, number: int, code: int) -> None:
    source = HOLD_TWO.format(script=str(fake_server), ports=free_ports(2))
    command = [sys.executable, "-c", source]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        assert process.stdout is not None
        one, two, _, child = process.stdout.readline().split()
        process.send_signal(number)
        assert process.wait(60) == code
        timer.cancel()
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(int(pid)) for pid in (one, two, child)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in (one, two, child) if psutil.pid_exists(int(pid))]


def test_a_server_that_does_not_start_says_why(fake_server: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="the server of broken did not start; its last lines:\nthe engine is on fire"),
        started_server(Path("x"), free_ports(1)[0], "broken", []),
    ):
        pass
