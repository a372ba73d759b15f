import json
import os
import subprocess
import sys
import time

import pytest
import torch

from raydistill.errors import ConfigError, RunError
from raydistill.ptq import overlay, runner
from raydistill.ptq.overlay import Calibrated, Failed, find_interpreter, run_job
from raydistill.quant.grid import dequantize

BOTH = """
say(event="ready")
for number, grid in enumerate(job["grids"]):
    say(event="progress", grid=number, done=1, total=2)
    write(number, has_zero_point=not grid["symmetric"])
    say(event="done", grid=number, seconds=1.5, notes=[])
"""


def ignore(what, done):
    pass


def test_every_grid_comes_back_as_codes_that_decode_by_its_format(job, fake_python, tmp_path):
    told = []
    made = run_job(job, tmp_path / "log", lambda what, done: told.append((what, done)), fake_python(BOTH))
    assert [type(one) for one in made] == [Calibrated, Calibrated]
    assert [one.fmt for one in made] == list(job.grids)
    assert made[0].codes["layer"].zero_point_OG is not None
    assert made[1].codes["layer"].zero_point_OG is None
    assert torch.equal(dequantize(made[1].codes["layer"]), torch.full((4, 32), -0.5))
    assert made[0].others.keys() == {"norm.weight"}
    assert told == [
        ("gptq int2-g32-asym-absmax", 0.5),
        ("gptq int2-g32-asym-absmax", 1),
        ("gptq int4-g32-sym-absmax", 1.5),
        ("gptq int4-g32-sym-absmax", 2),
    ]


def test_the_runner_is_told_everything_it_needs(job, fake_python, tmp_path):
    seen = tmp_path / "seen.json"
    run_job(job, tmp_path / "log", ignore, fake_python(f"Path({str(seen)!r}).write_text(json.dumps(job))\n{BOTH}"))
    told = json.loads(seen.read_text())
    assert (told["method"], told["layers"], told["seed"], told["dtype"]) == ("gptq", ["layer"], 7, "float32")
    assert told["rows"] == [[1, 2, 3], [4, 5]]
    assert [grid["bits"] for grid in told["grids"]] == [2, 4]
    assert not os.path.exists(told["out"]), "the exchange folder is gone"


def test_a_grid_that_cannot_be_done_has_its_reason_and_the_others_are_done(job, fake_python, tmp_path):
    body = """
say(event="ready")
say(event="failed", grid=0, seconds=0.1, reason="ValueError: no kernel for 2 bits")
write(1, has_zero_point=False)
say(event="done", grid=1, seconds=2.0, notes=["rounded to nearest: layer"])
"""
    first, second = run_job(job, tmp_path / "log", ignore, fake_python(body))
    assert first == Failed(fmt=job.grids[0], reason="ValueError: no kernel for 2 bits", seconds=0.1)
    assert second.notes == ("rounded to nearest: layer",)


def test_what_a_killed_process_had_finished_is_kept_and_the_rest_says_how_it_ended(job, fake_python, tmp_path):
    body = """
say(event="ready")
write(0, has_zero_point=True)
say(event="done", grid=0, seconds=2.0, notes=[])
os.kill(os.getpid(), 9)
"""
    first, second = run_job(job, tmp_path / "gptq.log", ignore, fake_python(body))
    assert isinstance(first, Calibrated)
    assert second.reason == f"llm-compressor was killed (for want of memory?); see {tmp_path}/gptq.log"


def test_a_process_that_cannot_start_is_one_line_with_its_last_words_and_a_way_out(job, fake_python, tmp_path):
    body = "sys.exit('ModuleNotFoundError: No module named llmcompressor')"
    with pytest.raises(RunError, match=r"did not start \(ModuleNotFoundError: No module .*make ptq") as error:
        run_job(job, tmp_path / "log", ignore, fake_python(body))
    assert "\n" not in str(error.value)


def test_the_process_ends_when_its_caller_is_interrupted(job, fake_python, tmp_path):
    pid_file = tmp_path / "pid"
    body = f"""
Path({str(pid_file)!r}).write_text(str(os.getpid()))
say(event="ready")
say(event="progress", grid=0, done=1, total=2)
time.sleep(600)
"""

    def interrupt(what, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "log", interrupt, fake_python(body))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_the_runner_ends_with_its_caller_even_if_that_was_killed():
    code = "from raydistill.ptq.runner import _end_with_stdin; print('up', flush=True); _end_with_stdin()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    time.sleep(0.2)
    assert process.poll() is None
    process.stdin.close()  # what the death of the other side looks like
    assert process.wait(30) == 1
    process.stdout.close()


def test_without_the_environment_make_ptq_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"set it up with `make ptq`"):
        find_interpreter([tmp_path])
    (tmp_path / overlay.ENVIRONMENT / "bin").mkdir(parents=True)
    (tmp_path / overlay.ENVIRONMENT / "bin" / "python").touch()
    with pytest.raises(ConfigError):  # half installed
        find_interpreter([tmp_path])
    (tmp_path / overlay.ENVIRONMENT / ".installed").touch()
    assert find_interpreter([tmp_path / "elsewhere", tmp_path]) == tmp_path / overlay.ENVIRONMENT / "bin" / "python"


def test_batches_hold_every_row_once_without_padding_and_within_the_budget():
    rows = [[number] * length for number, length in enumerate([3, 5, 3, 3, 9, 5, 3])]
    batches = [batch["input_ids"] for batch in runner.batches({"rows": rows, "batch_tokens": 9})]
    assert sorted(row for batch in batches for row in batch.tolist()) == sorted(rows)
    assert [tuple(batch.shape) for batch in batches] == [(3, 3), (1, 3), (1, 5), (1, 5), (1, 9)]
