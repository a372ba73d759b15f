"""What docs/extending.md promises: its own code blocks, run."""

import asyncio
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import raydistill
from raydistill import launch
from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.losses.divergence import DIVERGENCES, check_divergence, divergence_named, generalized_jsd, kl
from raydistill.losses.objective import Objective
from raydistill.quant.formats import BITS, CODEBOOKS, format_from_dict
from raydistill.quant.grid import dequantize, quantize
from raydistill.quant.packing import pack, unpack

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)


def block(language: str, containing: str) -> str:
    (found,) = [text for name, text in BLOCKS if name == language and containing in text]
    return found


class FakeLaunch:
    """Ends at once, with what a run leaves behind."""

    def __init__(self, config: Config, pools: object, console: object) -> None:
        self._config = config

    async def run(self) -> SimpleNamespace:
        assert self._config.objective.on_policy_fraction == 1.0, "as configs/int4_onpolicy.toml says"
        return SimpleNamespace(export=self._config.student.model, metrics={"rows": self._config.data.path})


@pytest.mark.parametrize("is_notebook", [False, True])
def test_the_script_runs_also_where_an_event_loop_runs_already(
    is_notebook: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch, "Launch", FakeLaunch)

    async def cell() -> None:
        exec(block("python", "summary = run(config)"), {})
        launch.Pools().shutdown()

    if is_notebook:
        asyncio.run(cell())
    else:
        exec(block("python", "summary = run(config)"), {})
    assert capsys.readouterr().out == "my/model {'rows': PosixPath('rows.jsonl')}\n"


PROBE = """
import sys
sys.modules["torch"] = type(sys)("torch")  # seconds to import, and of no use here
sys.modules["torch"].Tensor = object
from raydistill.losses.divergence import divergence_named
from raydistill.__main__ import main
import raydistill.__main__ as entry

def probe(argv):
    print(divergence_named(argv[0]).__name__)

entry.VERBS["probe"] = ("probe_home", "probe", "")
sys.modules["probe_home"] = type(sys)("probe_home")
sys.modules["probe_home"].probe = probe
sys.exit(main())
"""


def test_the_console_script_finds_a_module_of_the_folder_it_is_called_in(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "my_losses.py").write_text("def skew_kl(p, q, beta, scale):\n    return (p - q).sum(-1)\n")
    script = tmp_path / "raydistill-probe"  # as pip writes one: Python puts the script's folder on sys.path, not ours
    script.write_text(PROBE)
    command = [sys.executable, str(script), "probe", "my_losses:skew_kl"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": ""}
    done = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "skew_kl"), done.stderr


@pytest.fixture
def my_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_losses.py").write_text(block("python", "def skew_kl"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    name: str = tomllib.loads(block("toml", "my_losses"))["objective"]["divergence"]
    return name


def test_a_divergence_of_ones_own_is_trained_on(my_losses: str) -> None:
    check_divergence(my_losses)
    objective = Objective(divergence=my_losses, beta=0.1)
    teacher = torch.randn(3, 7, dtype=torch.float64).log_softmax(-1).float()
    logits = torch.randn(3, 7, requires_grad=True)
    losses = objective.token_losses(
        logits,
        SimpleNamespace(logprobs_NV=teacher),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.bool),
    )
    mixture = (0.1 * teacher.exp() + 0.9 * logits.log_softmax(-1).exp()).log()
    torch.testing.assert_close(losses.loss_N, kl(teacher, mixture))
    losses.loss_N.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) > 0


def test_a_name_that_is_no_divergence_says_what_there_is() -> None:
    assert divergence_named("generalized_jsd") is generalized_jsd
    with pytest.raises(
        UserError, match=r"objective.divergence='generalised_jsd' is unknown; did you mean 'generalized_jsd'"
    ):
        divergence_named("generalised_jsd")
    with pytest.raises(UserError, match=r"cannot be imported: No module named 'no_such_losses'; run from the folder"):
        divergence_named("no_such_losses:skew_kl")
    with pytest.raises(UserError, match=r"cannot be imported: .* has no attribute 'kll'"):
        divergence_named("raydistill.losses.divergence:kll")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return (p - q).mean()", "answers a small example of 2 tokens with"),
        ("return ((p - q) / 0).sum(-1)", "finite number of nats per token"),
        ("return (p.exp() * p).sum(-1)", "fails on a small example"),
        ("return p @ q", "fails on a small example"),
    ],
)
def test_a_divergence_that_cannot_be_trained_on_is_refused(body: str, said: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"def bad(p, q, beta, scale):\n    {body}", namespace)
    DIVERGENCES["bad"] = namespace["bad"]  # type: ignore[assignment]
    try:
        with pytest.raises(UserError, match=said):
            check_divergence("bad")
    finally:
        del DIVERGENCES["bad"]


def test_a_codebook_of_ones_own_goes_from_config_to_file_and_back() -> None:
    config = Config.model_validate(tomllib.loads(block("toml", "codebook")))
    fmt = config.quant.weight_format
    assert fmt is not None
    assert (fmt.name, fmt.bits) == ("codebook6-g32", 3)
    weight = torch.randn(8, 64)
    quantized = quantize(weight, fmt)
    values = dequantize(quantized).reshape(8, 2, 32) / quantized.scale_OG.float()[:, :, None]
    assert fmt.codebook is not None
    distance = (values[..., None] - torch.tensor(fmt.codebook)).abs().amin(-1)
    assert float(distance.max()) < 1e-6
    nearest = (weight.reshape(8, 2, 32) / quantized.scale_OG.float()[:, :, None])[..., None] - torch.tensor(
        fmt.codebook
    )
    assert torch.equal(nearest.abs().argmin(-1).reshape(8, 64) + fmt.code_min, quantized.codes_OI.long())
    again = unpack(pack(quantized))
    assert torch.equal(again.codes_OI, quantized.codes_OI)
    assert format_from_dict({**fmt.to_dict(), "codebook": list(fmt.codebook)}) == fmt


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    config = Config.model_validate(
        {"quant": {"format": "nf4", "group_size": 64, "symmetric": True, "scale": "absmax", "scale_dtype": "float32"}}
    )
    fmt = config.quant.weight_format
    assert fmt is not None
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(torch.tensor(CODEBOOKS["nf4"]), state.code.cpu())
    torch.testing.assert_close(
        dequantize(quantize(weight, fmt)), functional.dequantize_4bit(packed, state), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ({"format": "codebook"}, "needs quant.format='codebook', and that needs one"),
        ({"format": "int4", "codebook": [-1, 1]}, "a codebook of your own needs quant.format='codebook'"),
        ({"format": "codebook", "codebook": [-1, 1]}, "true: a codebook has its zero where it is"),
        ({"format": "nf4", "symmetric": True}, "quant.scale='searched' with a codebook"),
        ({"format": "codebook", "codebook": [1, -1], "symmetric": True, "scale": "absmax"}, "values from low to high"),
        ({"format": "codebook", "codebook": [-0.5, 0.5], "symmetric": True, "scale": "absmax"}, "is 1 or -1"),
        ({"format": "codebook", "codebook": [-2, 1], "symmetric": True, "scale": "absmax"}, "values"),
        ({"format": "codebook", "codebook": [1], "symmetric": True, "scale": "absmax"}, "2 to 256 values"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(quant: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Config.model_validate({"quant": quant})


def test_the_names_of_formats_are_the_entries_of_the_two_tables() -> None:
    option = Config.model_json_schema()["$defs"]["QuantSection"]["properties"]["format"]["anyOf"][0]
    assert option["enum"] == [*BITS, *CODEBOOKS, "codebook"]
    with pytest.raises(ValueError, match="'int3', 'int2', 'nf4'"):
        Config.model_validate({"quant": {"format": "int5"}})


ADDED = """
import raydistill.quant.formats as formats
source = open(formats.__file__).read().replace('"int2": 2}', '"int2": 2, "int6": 6}')
exec(compile(source, formats.__file__, "exec"), formats.__dict__)
from raydistill.config import Config
print(Config.model_validate({"quant": {"format": "int6"}}).quant.weight_format.name)
"""


def test_one_entry_makes_a_format_that_the_config_accepts() -> None:
    done = subprocess.run([sys.executable, "-c", ADDED], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "int6-g32-asym-searched", done.stderr


def test_another_width_of_the_integer_grid_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    from raydistill.quant.formats import named_format

    monkeypatch.setitem(BITS, "int6", 6)
    fmt = named_format("int6", group_size=16, symmetric=False, scale="searched")
    weight = torch.randn(4, 32)
    error = (dequantize(unpack(pack(quantize(weight, fmt)))) - weight).square().mean()
    assert float(error) < 2e-3


def test_the_package_hands_on_its_api_and_stays_light() -> None:
    assert set(raydistill.__all__) <= {*dir(raydistill), *raydistill._HOMES}
    assert raydistill.load_config(["--trainer.num_steps", "5"]).config.trainer.num_steps == 5
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = raydistill.runn
    code = "import sys, raydistill; print(sorted({'torch', 'ray', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
