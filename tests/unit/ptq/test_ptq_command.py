import json

import pytest

from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.errors import ConfigError
from raydistill.ptq import command, overlay
from raydistill.ptq.command import ptq_command
from raydistill.ptq.overlay import Calibrated, Failed
from raydistill.quant.export import load_exported, read_manifest
from raydistill.quant.grid import quantize
from raydistill.quant.student import quantizable_modules
from raydistill.results.record import RunRecord


@pytest.fixture
def run(capsys):
    def call(*argv):
        code = main_with_errors(ptq_command, [str(arg) for arg in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def calibrated(monkeypatch):
    """llm-compressor played by rounding; gives the jobs that were run."""
    jobs = []

    def play(job, log, on_progress, python=None):
        jobs.append(job)
        log.write_text("what the library said")
        layers = quantizable_modules(load_exported(job.model))
        codes = {name: quantize(layers[name].weight, job.grids[0]) for name in job.layers}
        return [Calibrated(fmt=job.grids[0], codes=codes, others={}, seconds=1.0)]

    monkeypatch.setattr(overlay, "find_interpreter", lambda: None)
    monkeypatch.setattr(overlay, "run_job", play)
    return jobs


@pytest.fixture
def finished_run(rows, model, tmp_path):
    config = Config.model_validate(
        {
            "student": {"model": str(model), "dtype": "float32"},
            "data": {
                "path": str(rows.train_path), "eval_rows": 10, "max_length": 200, "min_completion": 1, "min_prompt_room": 1,
            },
            "quant": {"format": "int2", "symmetric": True, "scale_dtype": "bfloat16"},
            "rollout": {"max_new_tokens": 16},
        }
    )  # fmt: skip
    folder = tmp_path / "runs" / "first"
    with RunRecord(folder) as record:
        record.start(name="first", config=config.model_dump(mode="json"), provenance={}, seed=0)
    return folder


def test_rounding_needs_no_rows_and_writes_an_export(run, model, tmp_path):
    out = tmp_path / "new" / "int3"
    code, printed, _ = run("rtn-searched", model, "--format", "int3", "--to", out, "--json")
    assert code == 0
    report = json.loads(printed)
    manifest = read_manifest(out)
    assert report["format"] == manifest["format"]["name"] == "int3-g32-asym-searched"
    assert report["codes_hash"] == manifest["codes_hash"]
    assert manifest["extra"]["role"] == "ptq"
    assert report["calibration_rows"] is None
    assert load_exported(out) is not None


def test_int4_is_stored_as_other_tools_read_it(run, model, tmp_path):
    out = tmp_path / "int4"
    assert run("rtn-absmax", model, "--symmetric", "--to", out)[0] == 0
    assert read_manifest(out)["as"] == "compressed-tensors"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"


def test_a_file_of_rows_calibrates_with_those_that_are_drawn(run, calibrated, rows, model, tmp_path):
    out = tmp_path / "gptq"
    code, printed, err = run("gptq", model, "--data", rows.train_path, "--rows", 12, "--to", out, "--json")
    assert code == 0
    (job,) = calibrated
    assert len(job.calibration.rows) == 12 == json.loads(printed)["calibration_rows"]
    assert "calibration: 12 rows" in err
    assert "drawn with seed 0 from 60" in err
    assert job.grids[0].name == "int4-g32-asym-absmax"
    assert read_manifest(out)["extra"]["calibration"] == {"rows": 12, "seed": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq"], "no log is left"


def test_a_run_lends_model_grid_and_its_training_rows(run, calibrated, finished_run, model, tmp_path):
    from transformers import AutoTokenizer

    from raydistill.data.dataset import load_dataset

    out = tmp_path / "awq"
    assert run("awq", finished_run, "--to", out)[0] == 0
    (job,) = calibrated
    assert job.model == model
    assert job.grids[0].name == "int2-g32-sym-absmax-bfloat16"
    assert job.dtype == "float32"
    section = Config.model_validate(
        json.loads((finished_run / "record.jsonl").read_text().splitlines()[0])["config"]
    ).data
    tokenizer = AutoTokenizer.from_pretrained(model)
    train = load_dataset(section, tokenizer, 256, False, stop_ids=[tokenizer.eos_token_id]).train
    trained = {(*example.prompt_ids.tolist(), *example.reference_ids.tolist()) for example in train}
    assert set(job.calibration.rows) == trained, "all of them, and no row that was held out"
    assert (out / "raydistill-source.json").is_file(), "evaluate finds the run's teacher and rows"


def test_switches_win_over_the_run(run, calibrated, finished_run, tmp_path):
    switches = ["--format", "int3", "--asymmetric", "--scale", "searched", "--group-size", "channel"]
    assert run("gptq", finished_run, *switches, "--rows", 3, "--seed", 5, "--to", tmp_path / "out")[0] == 0
    (job,) = calibrated
    assert job.grids[0].name == "int3-channel-asym-searched-bfloat16"
    assert (len(job.calibration.rows), job.calibration.seed) == (3, 5)


def test_what_llm_compressor_cannot_do_is_one_line_with_reason_and_log(
    run, calibrated, rows, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(overlay, "run_job", lambda job, *_: [Failed(fmt=job.grids[0], reason="ValueError: no")])
    out = tmp_path / "gptq"
    code, _, err = run("gptq", model, "--data", rows.train_path, "--to", out)
    assert code == 1
    assert f"gptq has no answer for int4-g32-asym-absmax: ValueError: no (its log: {out}.log)" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gptq", "MODEL", "--to", "NEW"], "gptq needs calibration rows: give --data FILE"),
        (["rtn-absmax", "MODEL", "--to", "NEW", "--data", "ROWS"], "rtn-absmax looks at no rows; leave it out"),
        (["rtn-absmax", "MODEL", "--to", "NEW", "--scale", "searched"], "names its scales itself"),
        (["rtn-absmax", "MODEL", "--to", "MODEL"], "exists; choose another folder"),
        (["gptq", "MODEL", "--to", "NEW", "--data", "missing.jsonl"], "--data missing.jsonl is not a file"),
        (["rtn-absmax", "MODEL", "--to", "NEW", "--group-size", "48"], "group_size=48 does not divide the 64 inputs"),
        (["rtn-absmax", "nowhere", "--to", "NEW"], "nowhere is neither a folder nor a hub id"),
        (["rtn-absmax", "EMPTY", "--to", "NEW"], "is no model"),
        (["rtn-absmax", "MODEL", "--to", "NEW", "--format", "int2", "--as", "compressed-tensors"], "use --as packed"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(run, calibrated, rows, model, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    places = {"MODEL": model, "NEW": tmp_path / "new", "ROWS": rows.train_path, "EMPTY": tmp_path / "empty"}
    code, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_quantized_model_is_not_quantized_again(run, model, tmp_path):
    once = tmp_path / "once"
    assert run("rtn-absmax", model, "--to", once)[0] == 0
    code, _, err = run("rtn-absmax", once, "--to", tmp_path / "twice")
    assert code == 2
    assert "is quantized already" in err


def test_without_the_environment_nothing_is_loaded(run, rows, model, tmp_path, monkeypatch):
    def missing():
        raise ConfigError("set it up with `make ptq`")

    monkeypatch.setattr(overlay, "find_interpreter", missing)
    monkeypatch.setattr(command, "run_plan", lambda plan: pytest.fail("it went on"))
    code, _, err = run("gptq", model, "--data", rows.train_path, "--to", tmp_path / "new")
    assert (code, err) == (2, "error: set it up with `make ptq`\n")
