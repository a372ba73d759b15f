"""The verbs export, serve and chat, without a server: which folder comes out of a run, and what is refused."""

import json
import os
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM, Qwen3Config

from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.evaluate.run_defaults import SOURCE_FILE, read_defaults
from raydistill.messages import EvalReport, Span, StudentWeights
from raydistill.models import StudentSpec, build_student
from raydistill.quant.export import export_live, load_exported
from raydistill.quant.hashing import hash_codes
from raydistill.quant.student import adapter_state, load_adapter_state, student_codes
from raydistill.recovery.checkpoint import save_checkpoint
from raydistill.recovery.keeper import CheckpointKeeper
from raydistill.results.record import RunRecord
from raydistill.serving.chat import chat_command
from raydistill.serving.export import export_command, export_run
from raydistill.serving.model_card import public_name
from raydistill.serving.serve import plan_server, servable_folder, serve_command
from raydistill.serving.server import served_models

IDS = torch.arange(40).reshape(2, 20)


class Run:
    """A run's folder with three checkpoints, and the students they hold."""

    def __init__(self, root: Path, fmt: str = "int4", mode: str = "merged", own_export: bool = True) -> None:
        self.base, self.folder = root / "base", root / "runs" / "mine"
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads, tie_word_embeddings=True)).save_pretrained(
            self.base
        )
        self.config = Config.model_validate(
            {
                "student": {"model": str(self.base), "dtype": "float32"},
                "quant": {"format": fmt, "group_size": 32},
                "adapter": {"mode": mode, "rank": 2, "alpha": 4},
                "trainer": {"num_steps": 4},
            }
        )
        self.logits: dict[int, torch.Tensor] = {}
        self.hashes: dict[int, str] = {}
        self._train(own_export)

    def _train(self, own_export: bool) -> None:
        spec = StudentSpec.of(self.config)
        keeper = CheckpointKeeper(self.folder / "checkpoints", keep_last=5, keep_best=5)
        with RunRecord(self.folder) as record:
            record.start(
                name="mine", config=self.config.model_dump(mode="json"), provenance={}, seed=0, data_fingerprint="f00d"
            )
            for version, kl in [(0, 0.5), (2, 0.1), (4, 0.2)]:
                student = build_student(spec)
                generator = torch.Generator().manual_seed(version)
                state = {
                    k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in adapter_state(student).items()
                }
                load_adapter_state(student, state)
                self.hashes[version] = hash_codes(student_codes(student))
                self.logits[version] = logits(student)
                weights = StudentWeights(version=version, tensors={k: v.numpy() for k, v in state.items()}, probe=None)
                save_checkpoint(self.folder / "checkpoints", weights, {"codes_hash": self.hashes[version]})
                metrics = {"evaluate/kl_nats": kl, "evaluate/exact_match": 0.5, "evaluate/exact_match_se": 0.01}
                span = Span(stage="evaluate", actor="e", step=version, start_s=0.0, end_s=1.0)
                record.evaluation(EvalReport(version=version, metrics=metrics, span=span))
                keeper.evaluated(version, metrics)
                if own_export and version == 2:
                    export_live(self.folder / "export", student, self.base, {"run": "mine", "version": 2})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("served"), fmt="int2", mode="served", own_export=False)


def test_int4_exports_what_transformers_loads_alone(run: Run, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "exports" / "student"
    assert main_with_errors(export_command, [str(run.folder), "--to", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["version"], report["layout"], report["codes_hash"]) == (2, "compressed-tensors", run.hashes[2])
    alone = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert torch.equal(logits(alone), run.logits[2])
    assert torch.equal(logits(load_exported(out)), run.logits[2])
    assert [path.name for path in out.parent.iterdir()] == ["student"]
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert '| chat template\'s variables | `{"enable_thinking": false}` |' in card
    numbers = (
        "| teacher | 0 | - |",
        "| 0.5 | 50.0 ± 1.0 % |",
        "| **this student (step 2)** | 0.1 | 50.0 ± 1.0 % |",
    )
    for said in (*numbers, "plain rounding to int4-g32-asym", "`f00d`", run.hashes[2], "step 2 of 4"):
        assert said in card
    for path in out.rglob("*"):  # but for the file that stays here, nothing knows this machine
        if path.is_file() and path.suffix != ".safetensors" and path.name != SOURCE_FILE:
            assert str(run.folder.parents[1]) not in path.read_text(), path


def test_an_export_does_not_need_the_base_model_if_the_run_has_its_own(run: Run, tmp_path: Path) -> None:
    run.base.rename(run.base.with_name("gone"))
    try:
        export_run(run.folder, tmp_path / "out", layout="packed")
    finally:
        run.base.with_name("gone").rename(run.base)
    assert torch.equal(logits(load_exported(tmp_path / "out")), run.logits[2])


@pytest.mark.parametrize(("checkpoint", "version"), [("last", 4), ("0", 0)])
def test_other_checkpoints_are_rebuilt(run: Run, tmp_path: Path, checkpoint: str, version: int) -> None:
    report = export_run(run.folder, tmp_path / "out", checkpoint=checkpoint, layout="dequantized")
    assert (report.version, report.codes_hash) == (version, run.hashes[version])
    assert torch.equal(logits(load_exported(tmp_path / "out")), run.logits[version])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_served_student_is_base_and_adapter(served: Run, tmp_path: Path) -> None:
    report = export_run(served.folder, tmp_path / "out")
    assert report.layout == "packed" and (tmp_path / "out" / "adapter").is_dir()
    assert torch.equal(logits(load_exported(tmp_path / "out")), served.logits[2])
    export_run(served.folder, tmp_path / "merged", layout="dequantized", merge_adapter=True)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    torch.testing.assert_close(logits(alone), served.logits[2], rtol=1e-5, atol=1e-5)


def test_the_cards_code_loads_base_and_adapter(tmp_path: Path) -> None:
    run = Run(tmp_path, fmt="int4", mode="served", own_export=False)
    for layout in ("compressed-tensors", "dequantized"):
        export_run(run.folder, tmp_path / layout, layout=layout)
        code = (tmp_path / layout / "README.md").read_text().partition("```python\n")[2].partition("tokenizer = ")[0]
        names: dict[str, Any] = {"FOLDER": str(tmp_path / layout)}
        exec(code, names)
        assert torch.equal(logits(names["model"].eval()), run.logits[2]), layout
        assert "load_adapter" in code


@pytest.mark.parametrize(
    ("switches", "complaint"),
    [
        (["--checkpoint", "3"], "no checkpoint of that step; there are 0, 2, 4"),
        (["--checkpoint", "newest"], "neither best, last nor a step"),
        (["--as", "compressed-tensors"], "use --as packed"),
        (["--as", "packed", "--merge-adapter"], "use --as dequantized, or train with adapter.mode=merged"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(served: Run, tmp_path, capsys, switches, complaint) -> None:
    assert main_with_errors(export_command, [str(served.folder), "--to", str(tmp_path / "out"), *switches]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_or_no_run_is_refused(run: Run, tmp_path: Path, capsys: Any) -> None:
    assert main_with_errors(export_command, [str(run.folder), "--to", str(tmp_path)]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert main_with_errors(export_command, [f"{run.folder}s", "--to", str(tmp_path / "out")]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_base_model_that_changed_is_noticed(tmp_path: Path, capsys: Any) -> None:
    run = Run(tmp_path, own_export=False)
    model = AutoModelForCausalLM.from_pretrained(run.base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(run.base)
    assert main_with_errors(export_command, [str(run.folder), "--to", str(tmp_path / "out")]) == 2
    assert "is not the model that the run started from" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "runs"]


def test_the_folder_is_uploaded_to_a_private_repository(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    hub = SimpleNamespace(
        token="secret",
        create_repo=lambda repo, **kwargs: calls.append((repo, kwargs)),
        upload_folder=lambda **kwargs: calls.append((kwargs["repo_id"], kwargs)),
    )
    report = export_run(run.folder, tmp_path / "out", push_to="me/student", hub=hub)
    assert report.pushed_to == "me/student"
    assert calls[0] == ("me/student", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == str(tmp_path / "out")
    assert calls[1][1]["ignore_patterns"] == [SOURCE_FILE] and (tmp_path / "out" / SOURCE_FILE).is_file()

    monkeypatch.setattr("raydistill.serving.export._stored_token", lambda: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    arguments = [str(run.folder), "--to", str(tmp_path / "other"), "--push-to-hub", "me/student"]
    assert main_with_errors(export_command, arguments) == 2
    assert "needs a token: log in with `hf auth login`" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_upload_that_fails_leaves_the_folder(run: Run, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise HTTPError("no route to the hub")

    with pytest.raises(RuntimeError, match="is written, but --push-to-hub me/student failed: no route"):
        export_run(
            run.folder, tmp_path / "out", push_to="me/student", hub=SimpleNamespace(token="t", create_repo=refuse)
        )
    assert (tmp_path / "out" / "README.md").is_file()


def test_names_of_folders_stay_private() -> None:
    assert public_name("/home/me/models/qwen") == "qwen"
    assert public_name("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


def test_serving_a_packed_folder_writes_plain_weights_once(served: Run, tmp_path: Path, capsys: Any) -> None:
    packed = tmp_path / "student"
    export_run(served.folder, packed)
    copy = servable_folder(packed, takes_int4=True)
    assert copy == tmp_path / "student.dequantized" and "writing plain weights" in capsys.readouterr().err
    alone = AutoModelForCausalLM.from_pretrained(copy, dtype="auto").eval()
    torch.testing.assert_close(logits(alone), served.logits[2], rtol=1e-5, atol=1e-5)
    made = (copy / "model.safetensors").stat().st_mtime_ns
    assert servable_folder(packed, takes_int4=True) == copy and "using the plain weights" in capsys.readouterr().err
    assert (copy / "model.safetensors").stat().st_mtime_ns == made
    other = tmp_path / "again" / "student"  # the same codes, another adapter
    export_run(served.folder, other, checkpoint="0")
    packed.rename(tmp_path / "aside")
    other.rename(packed)
    assert servable_folder(packed, takes_int4=True) == copy and "writing plain weights" in capsys.readouterr().err
    alone = AutoModelForCausalLM.from_pretrained(copy, dtype="auto").eval()
    torch.testing.assert_close(logits(alone), served.logits[0], rtol=1e-5, atol=1e-5)


def test_int4_is_served_as_it_is_where_there_is_a_kernel(run: Run, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "student"
    export_run(run.folder, out)
    assert servable_folder(out, takes_int4=True) == out
    copy = servable_folder(out, takes_int4=False)
    assert copy != out and "no kernel on this processor: writing plain weights" in capsys.readouterr().err
    alone = AutoModelForCausalLM.from_pretrained(copy, dtype="auto").eval()
    assert torch.equal(logits(alone), run.logits[2])
    assert servable_folder(copy, takes_int4=False) == copy
    (copy / "raydistill.json").unlink()
    with pytest.raises(UserError, match="is in the way"):
        servable_folder(out, takes_int4=False)


def test_the_servers_command_fits_the_weights(run: Run, served: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    started: list[list[str]] = []
    export_run(run.folder, tmp_path / "int4")
    environment: dict[str, str] = {}

    def execute(_: str, arguments: list[str], env: dict[str, str]) -> None:
        started.append(arguments)
        environment.update(env)

    extra = ["--max-model-len", "64", "--block-size=16"]
    monkeypatch.setattr("raydistill.serving.serve.is_cpu", lambda: True)
    monkeypatch.setattr("raydistill.actors.vllm_folders._cpu_takes_int4", lambda: True)
    serve_command([str(tmp_path / "int4"), "--port", "8123", "--", *extra], execute)
    text = " ".join(started[0])
    assert f"-m vllm.entrypoints.openai.api_server --model {tmp_path / 'int4'} --host 127.0.0.1 --port 8123" in text
    assert "--served-model-name int4 " in text and "--dtype bfloat16" in text
    template = started[0][started[0].index("--default-chat-template-kwargs") + 1]
    assert json.loads(template) == run.config.data.template == {"enable_thinking": False}
    assert text.endswith(" ".join(extra)) and text.count("--block-size") == 1
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3" and environment["HF_HUB_OFFLINE"] == "1"

    export_run(served.folder, tmp_path / "lora", layout="dequantized")
    text = " ".join(plan_server(tmp_path / "lora", 1, "mine", [], is_cpu=True).arguments)
    assert f"--lora-modules mine={tmp_path / 'lora' / 'adapter'} --max-lora-rank 8" in text
    assert "--served-model-name mine-base" in text and "--enable-lora" in text and "--dtype float32" in text


def test_an_export_keeps_what_its_run_measured_with(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    export_run(run.folder, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    found, recorded = read_defaults(tmp_path / "out"), read_defaults(run.folder)
    assert found == recorded and found is not None
    assert (found.run, found.teacher, found.temperature) == ("mine", str(run.base), 1.0)


def test_what_cannot_be_served_is_refused_in_one_line(
    run: Run, served: Run, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    export_run(run.folder, tmp_path / "int4")
    export_run(served.folder, tmp_path / "lora", layout="dequantized")
    shutil.copytree(tmp_path / "lora", tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "adapter")
    shutil.copytree(tmp_path / "lora", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").unlink()
    shutil.copytree(served.folder, tmp_path / "open")
    complaints = {
        "": "holds no config.json",
        "nowhere": "nowhere does not exist",
        "lora/adapter": "is an adapter without its base; give the folder above it",
        "base": "is a base without its adapter: adapter/ is missing",
        "torn": "holds no .safetensors file",
        "open": "has no export/ folder, so it did not finish",
    }

    def refused(*argv: str) -> str:
        assert main_with_errors(serve_command, [str(arg) for arg in argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    for name, complaint in complaints.items():
        assert complaint in refused(str(tmp_path / name))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} on 127.0.0.1 cannot be used (Address already in use); give another --port" in refused(
            str(tmp_path / "int4"), "--port", port
        )
    assert "port 99999 on 127.0.0.1 cannot be used" in refused(str(tmp_path / "int4"), "--port", "99999")
    monkeypatch.setattr("raydistill.serving.serve.importlib.util.find_spec", lambda name: None)
    assert "vLLM is not installed here" in refused(str(tmp_path / "int4"))


class FakeServer(BaseHTTPRequestHandler):
    """Answers as vLLM does; remembers the conversation it was sent."""

    asked: list[Any]

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "student"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        FakeServer.asked.append(body)
        pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("It is ", "42.")]
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
        self._send("".join([*lines, "data: [DONE]\n\n"]).encode())

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Any:
    FakeServer.asked = []
    server = HTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_chat_uses_the_server_that_answers(port: int, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked for a server on this machine
    assert served_models(port) == ["student"]
    assert chat_command(["exports/student", "--port", str(port), "--once", "6 * 7?"]) == 0
    assert capsys.readouterr().out == "It is 42.\n"
    lines = iter(["first", "second", "/reset", "third"])

    def read_line(*_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read_line)
    assert chat_command(["exports/student", "--port", str(port)]) == 0
    assert [[m["role"][0] for m in body["messages"]] for body in FakeServer.asked] == [
        ["u"],
        ["u"],
        ["u", "a", "u"],
        ["u"],
    ]


def test_chat_does_not_talk_to_another_model(port: int, capsys: Any) -> None:
    assert main_with_errors(chat_command, ["exports/other", "--port", str(port), "--once", "hello"]) == 2
    assert "serves student, not other" in capsys.readouterr().err


def test_chat_says_why_there_is_no_server(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    arguments = [str(tmp_path), "--port", "1", "--once", "hello"]
    assert main_with_errors(chat_command, arguments) == 2
    assert "holds no config.json" in capsys.readouterr().err
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setattr("raydistill.serving.chat.prepare_folder", lambda folder: folder)
    assert main_with_errors(chat_command, arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the server of ") and "did not start; " in error and "holds no config.json" in error
