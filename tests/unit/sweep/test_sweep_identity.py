"""Which changes of a sweep are noticed before it goes on under the names of its earlier trials."""

from pathlib import Path

import pytest

from raydistill.errors import UserError
from raydistill.results.record import RunRecord
from raydistill.sweep.identity import check_identity
from raydistill.sweep.spec import Sweep, load_sweep
from raydistill.sweep.state import SweepState

TWO = '[space]\n"trainer.learning_rate" = [1e-3, 2e-3]\n"data.template.style" = ["a", "b"]'


def sweep(tmp_path: Path, text: str, *arguments: str) -> Sweep:
    path = tmp_path / "lr.toml"
    path.write_text(text)
    found = load_sweep(path, ["--run.output", str(tmp_path), *arguments])
    found.folder.mkdir(parents=True, exist_ok=True)
    return found


def begun(tmp_path: Path, text: str) -> None:
    check_identity(sweep(tmp_path, text), retry_failed=False)
    found = sweep(tmp_path, text)
    SweepState.of(found).change(f"{found.name}-000", values={}, status="running")
    check_identity(found, retry_failed=False)  # the same again


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[space]\n"trainer.learning_rate" = [1e-3, 2e-3]', r"space\.data\.template\.style was .*, is not there"),
        (TWO + '\n"objective.beta" = [0.0]', r"space\.objective\.beta was not there, is "),
        (TWO.replace("1e-3, 2e-3", "2e-3, 1e-3"), r"space\.trainer\.learning_rate was .*0\.001, 0\.002.*is .*0\.002, 0\.001"),
        ('[settings]\n"quant.format" = "int3"\n' + TWO, r"settings\.quant\.format was 'int4', is 'int3'"),
        ('[settings]\n"data.template.day" = "monday"\n' + TWO, r"settings\.data\.template\.day was not there, is 'monday'"),
        ("seeds = [0, 1]\n" + TWO, r"seeds was \[\], is \[0, 1\]"),
    ],
)  # fmt: skip
def test_a_sweep_of_other_settings_does_not_go_on_in_the_same_folder(tmp_path: Path, text: str, complaint: str) -> None:
    begun(tmp_path, TWO)
    with pytest.raises(UserError, match=rf"cannot go on with other settings: .*{complaint}.*--resume never"):
        check_identity(sweep(tmp_path, text), retry_failed=False)


def test_until_a_trial_begins_the_settings_may_change(tmp_path: Path) -> None:
    """As where a sweep was refused for want of room, and somebody follows the advice."""
    check_identity(sweep(tmp_path, TWO), retry_failed=False)
    other = sweep(tmp_path, TWO, "--adapter.rank", "8")
    check_identity(other, retry_failed=False)
    SweepState.of(other).change("lr-000", values={}, status="running")
    with pytest.raises(UserError, match=r"settings\.adapter\.rank was 8, is 32"):
        check_identity(sweep(tmp_path, TWO), retry_failed=False)
    assert [path.name for path in other.folder.iterdir() if "identity" in path.name] == ["identity.json"]


def test_limits_devices_and_places_may_change(tmp_path: Path) -> None:
    """As where trials failed by a limit, and somebody follows the advice."""
    begun(tmp_path, TWO)
    other = ("--rollout.timeout_s", "9", "--rollout.num_actors", "2", "--checkpoint.keep_last", "1")
    check_identity(sweep(tmp_path, TWO, *other), retry_failed=False)


def test_a_trial_has_begun_whose_run_there_is_though_the_sweeps_file_has_gone(tmp_path: Path) -> None:
    begun(tmp_path, TWO)
    (tmp_path / "sweeps" / "lr" / "sweep.json").unlink()
    with RunRecord(tmp_path / "runs" / "lr-000") as record:
        record.start(name="lr-000", config={}, provenance={}, seed=0)
    with pytest.raises(UserError, match="cannot go on with other settings"):
        check_identity(sweep(tmp_path, TWO, "--adapter.rank", "8"), retry_failed=False)


def test_an_entry_of_a_table_that_is_gone_is_noticed(tmp_path: Path) -> None:
    begun(tmp_path, '[settings]\n"data.template.day" = "monday"\n' + TWO)
    with pytest.raises(UserError, match=r"settings\.data\.template\.day was 'monday', is not there"):
        check_identity(sweep(tmp_path, TWO), retry_failed=False)


def test_fields_in_another_order_give_the_trials_other_points(tmp_path: Path) -> None:
    begun(tmp_path, TWO)
    head, *lines = TWO.splitlines()
    turned = "\n".join([head, *reversed(lines)])
    with pytest.raises(
        UserError, match=r"trial 001 was trainer\.learning_rate=0\.001, .*style=b, is .*style=a, .*rate=0\.002"
    ):
        check_identity(sweep(tmp_path, turned), retry_failed=False)
    optuna = 'sampler = "optuna"\nnum_samples = 3\n'  # there a trial has its own values, whatever the order
    begun(tmp_path, f'name = "o"\n{optuna}{TWO}')
    check_identity(sweep(tmp_path, f'name = "o"\n{optuna}{turned}'), retry_failed=False)


def test_a_sweep_that_is_over_says_so_unless_failed_trials_run_again(tmp_path: Path) -> None:
    text = '[space]\n"trainer.learning_rate" = [1e-3]'
    begun(tmp_path, text)
    one = sweep(tmp_path, text)
    SweepState.of(one).change("lr-000", values={"trainer.learning_rate": 1e-3}, status="failed")
    with pytest.raises(UserError, match="has finished"):
        check_identity(one, retry_failed=False)
    check_identity(one, retry_failed=True)
