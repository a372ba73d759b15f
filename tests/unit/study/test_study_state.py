import json

import pytest

from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.ptq.baselines import Baseline
from raydistill.study.state import FILE, open_study, study_lock

CONFIG = Config.model_validate({"world": {"name": "stories"}, "trainer": {"num_steps": 10}})
FOUND = [Baseline(method="gptq", width="int2", folder="/x", format="int2-g32", kl_nats={"int2-g32": 0.5}, notes=("a",))]


def changed(config=CONFIG, **sections):
    data = config.model_dump()
    for section, values in sections.items():
        data[section] |= values
    return Config.model_validate(data)


def test_an_unfinished_study_goes_on_with_its_name_and_what_it_has_made(tmp_path):
    first = open_study(tmp_path, CONFIG)
    first.add("gptq", FOUND)
    second = open_study(tmp_path, CONFIG)
    assert (first.is_resumed, second.is_resumed) == (False, True)
    assert second.name == first.name
    assert second.baselines == {"gptq": FOUND}


def test_a_finished_study_starts_anew(tmp_path):
    first = open_study(tmp_path, CONFIG)
    first.add("gptq", FOUND)
    first.finish()
    second = open_study(tmp_path, CONFIG)
    assert not second.is_resumed
    assert second.baselines == {}
    assert json.loads((tmp_path / FILE).read_text())["is_finished"] is False


def test_other_settings_are_another_study_but_for_those_that_change_no_number(tmp_path):
    open_study(tmp_path, CONFIG)
    same = changed(run={"verbose": True}, cluster={"num_cpus": 3}, results={"uri": "http://mlflow"})
    assert open_study(tmp_path, same).is_resumed
    assert open_study(
        tmp_path, changed(rollout={"timeout_s": 9, "num_actors": 2}, checkpoint={"keep_last": 1})
    ).is_resumed
    assert open_study(tmp_path, changed(study={"tasks": ["arc_easy"], "task_limit": 9})).is_resumed
    assert not open_study(tmp_path, changed(trainer={"num_steps": 11})).is_resumed
    assert not open_study(tmp_path, changed(world={"recipe": {"hidden_size": 8}})).is_resumed


def test_never_resume_starts_anew_and_the_plain_command_then_goes_on_with_that_one(tmp_path):
    open_study(tmp_path, changed(run={"name": "first"}))
    anew = open_study(tmp_path, changed(run={"resume": "never", "name": "second"}))
    assert not anew.is_resumed
    again = open_study(tmp_path, CONFIG)
    assert (again.is_resumed, again.name) == (True, "second")


def test_a_named_study_that_has_finished_or_changed_is_refused_with_a_way_out(tmp_path):
    named = changed(run={"name": "mine"})
    open_study(tmp_path, named).finish()
    with pytest.raises(UserError, match=r"run.name='mine': the study has finished .*--resume never"):
        open_study(tmp_path, named)
    open_study(tmp_path, changed(run={"name": "other"}))
    with pytest.raises(UserError, match="was started with other settings"):
        open_study(tmp_path, changed(run={"name": "other"}, trainer={"num_steps": 3}))


def test_a_damaged_file_is_no_study(tmp_path):
    name = open_study(tmp_path, changed(run={"name": "first"})).name
    (tmp_path / FILE).write_text('{"name": "fir')
    assert name == "first"
    assert not open_study(tmp_path, CONFIG).is_resumed


def test_a_second_process_is_refused(tmp_path):
    message = "another process is at work on the study"
    with study_lock(tmp_path), pytest.raises(UserError, match=message), study_lock(tmp_path):
        pass
    with study_lock(tmp_path):
        pass
