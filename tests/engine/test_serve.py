"""`raydistill serve` on an int4 export: vLLM says what transformers says on the same folder, and ends by its pid.

Where the processor has AVX-512 vLLM runs the 4-bit weights themselves, elsewhere the plain copy that `serve` makes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raydistill.config import AdapterSection, QuantSection, StudentSection
from raydistill.errors import RunError
from raydistill.models import StudentSpec, build_student
from raydistill.quant.export import export_live
from raydistill.quant.layouts import write_layout
from raydistill.quant.student import adapter_state, load_adapter_state
from raydistill.serving.chat import chat_command
from raydistill.serving.load import load_generator, send
from raydistill.serving.server import served_models

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 600.0  # of vLLM, on a busy machine
NEW_TOKENS = 24
BFLOAT16_NOISE = 0.15  # in logits: the 4-bit kernel adds in another order than a dense product


@dataclass(frozen=True, kw_only=True)
class Serving:
    process: subprocess.Popen[bytes]
    folder: Path
    port: int


@pytest.fixture(scope="module")
def serving(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root = tmp_path_factory.mktemp("serve")
    spec = StudentSpec(
        student=StudentSection(model=str(tiny_model), dtype="bfloat16"),
        quant=QuantSection(format="int4", group_size=32, symmetric=False, scale_dtype="bfloat16"),
        adapter=AdapterSection(mode="merged", rank=4, alpha=8),
    )
    student = build_student(spec)
    generator = torch.Generator().manual_seed(0)
    load_adapter_state(
        student, {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in adapter_state(student).items()}
    )
    export_live(root / "packed", student, tiny_model, {})
    write_layout(root / "packed", root / "student", "compressed-tensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "raydistill", "serve", str(root / "student"), "--port", str(port)]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--", "--max-model-len", "128"], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while served_models(port) is None:
            assert process.poll() is None and time.monotonic() < deadline, (root / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield Serving(process=process, folder=root / "student", port=port)
    finally:
        if processes_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def processes_of(session: int) -> list[int]:
    """Ids of all processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def complete(serving: Serving, prompt: list[int]) -> dict[str, Any]:
    body = {"model": "student", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{serving.port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]


def test_the_load_generator_times_every_request(serving: Serving) -> None:
    generator = load_generator()
    load = send(generator, serving.port, "student", [[5 + n, 6, 7] for n in range(4)], new_tokens=6, concurrency=2)
    assert load.num_tokens == [6] * 4 and load.tokens_per_s == 24 / load.seconds
    assert all(
        0 < first < whole <= load.seconds for first, whole in zip(load.first_token_s, load.request_s, strict=True)
    )
    assert len(load.per_token_s) == 4 and min(load.per_token_s) > 0
    with pytest.raises(RunError, match="1 of 1 requests to student failed: Bad Request"):  # --max-model-len is 128
        send(generator, serving.port, "student", [[5] * 200], new_tokens=6, concurrency=1)


def test_the_server_says_what_transformers_says_and_leaves_nothing_behind(serving: Serving, capsys: Any) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(serving.folder)
    question = "Tom has 3 apples and buys 4. How many apples does Tom have?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    choice = complete(serving, prompt)
    model: Any = AutoModelForCausalLM.from_pretrained(serving.folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits_NV = model(torch.tensor([prompt + choice["token_ids"]])).logits[0, len(prompt) - 1 : -1].float()
        said = torch.tensor(choice["token_ids"])
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
    best_N2 = logits_NV.topk(2).values
    loss_N = best_N2[:, 0] - logits_NV.gather(1, said[:, None])[:, 0]
    assert float(loss_N.max()) < BFLOAT16_NOISE
    is_sure_N = best_N2[:, 0] - best_N2[:, 1] > 2 * BFLOAT16_NOISE  # one by one, tokens near a tie may fall either way
    sure = int(is_sure_N.long().cumprod(0).sum())
    assert greedy[:sure].tolist() == choice["token_ids"][:sure]
    capsys.readouterr()

    arguments = [str(serving.folder), "--port", str(serving.port), "--max-tokens", str(NEW_TOKENS)]
    assert chat_command([*arguments, "--once", question]) == 0
    assert capsys.readouterr().out == choice["text"] + "\n"

    assert len(processes_of(serving.process.pid)) >= 1
    serving.process.send_signal(signal.SIGTERM)
    serving.process.wait(180)
    deadline = time.monotonic() + 60
    while processes_of(serving.process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(serving.process.pid) == []
    assert served_models(serving.port) is None
