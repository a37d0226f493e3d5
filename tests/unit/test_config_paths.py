"""Checks of the settings that are paths."""

import errno
import os
from pathlib import Path

import pytest

from kdtrain.config import paths
from kdtrain.config.checks import check, path_problems
from kdtrain.config.checks import paths as path_checks
from kdtrain.config.load import Loaded
from kdtrain.config.problems import format_problems
from kdtrain.errors import ConfigError
from tests.support.config_cases import ProblemLines, runnable


def path_cases(tmp_path):
    """(configuration, key of its problem, words)"""
    store, model, empty, file = (tmp_path / name for name in ("store", "model", "empty", "file"))
    for folder, content in ((store, "manifest.json"), (model, "config.json"), (empty, None)):
        folder.mkdir(exist_ok=True)
        if content:
            (folder / content).write_text("{}")
    file.write_text("")
    good = {
        "data__train": [str(store)],
        "data__validation": str(store),
        "teacher__weights": str(model),
        "run__output_dir": str(tmp_path / "new" / "runs"),
    }
    changes = [
        ({}, None, ""),
        ({"run__resume": str(store)}, None, ""),
        ({"data__train": [str(store), "nowhere"]}, "data.train", f"does not exist (looked in {tmp_path})"),
        ({"data__validation": str(tmp_path / "no")}, "data.validation", "does not exist\n"),
        ({"data__train": [str(empty)]}, "data.train", "is not a token store: it has no manifest.json"),
        ({"teacher__weights": str(file)}, "teacher.weights", "is not a Hugging Face model folder"),
        ({"teacher__weights": "org/model"}, "teacher.weights", "hub names are not resolved"),
        ({"student__weights": str(empty)}, "student.weights", "it has no config.json"),
        ({"run__resume": str(tmp_path / "no")}, "run.resume", "does not exist"),
        ({"run__continue_from": str(tmp_path / "no")}, "run.continue_from", "does not exist"),
        ({"run__output_dir": str(file / "runs")}, "run.output_dir", f"{file} is not a folder"),
        ({"student__architecture": str(tmp_path / "no")}, "student.architecture", "does not exist"),
        ({"student__architecture": str(empty)}, "student.architecture", "it has no config.json"),
    ]
    return [(runnable(**{**good, **change}), key, words) for change, key, words in changes]


def test_each_wrong_path_is_one_problem_and_every_message_is_produced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ProblemLines(monkeypatch)
    for cfg, key, words in path_cases(tmp_path):
        found = path_problems(cfg)
        assert [problem.key for problem in found] == ([key] if key else [])
        assert words in format_problems(found, {})
    assert not (tmp_path / "new").exists(), "the check must not create anything"
    assert lines.not_reached(path_checks) == []


def test_runnable_configuration_passes_the_check(tmp_path):
    check(Loaded(path_cases(tmp_path)[0][0], {}), world_size=4)


def test_output_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    cfg = path_cases(tmp_path)[0][0]
    (tmp_path / "locked").mkdir(mode=0o500)
    cfg.run.output_dir = str(tmp_path / "locked" / "runs")
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    (found,) = path_problems(cfg)
    assert found.key == "run.output_dir"
    assert f"you have no permission in {tmp_path / 'locked'}" in found.why


def unusable_paths(tmp_path):
    """Path -> words of its problem, whichever setting holds it."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "plain").write_text("")
    return {
        "x" * 300: "holds a name of 300 bytes, longer than the 255 that a file name may have",
        str(tmp_path / ("é" * 128) / "y"): "holds a name of 256 bytes",
        "/".join(["z" * 100] * 50): "has 5049 bytes, more than the 4095 of a path",
        str(tmp_path / "loop"): "symbolic links that go in a circle",
        str(tmp_path / "loop" / "below"): "symbolic links that go in a circle",
        str(tmp_path / "dangling"): "is a symbolic link to nothing, which does not exist",
        str(tmp_path / "plain" / "below"): f"{tmp_path / 'plain'} is not a folder",
        "a\ud800b": "",  # reported as text that cannot be shown
        "a\0b": "",
    }


PATH_SETTINGS = [
    "run__output_dir",
    "run__resume",
    "run__continue_from",
    "data__train",
    "data__validation",
    "teacher__weights",
    "student__weights",
    "student__architecture",
]


@pytest.mark.parametrize("setting", PATH_SETTINGS)
def test_unusable_path_is_a_problem_of_its_setting_among_all_others(setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, words in unusable_paths(tmp_path).items():
        cfg = runnable(**{setting: [path] if setting == "data__train" else path, "optim__lr": -1.0})
        with pytest.raises(ConfigError) as caught:
            check(Loaded(cfg, {}), world_size=4)
        blocks = str(caught.value).split("\n\n")
        assert any(block.startswith("  optim.lr = -1.0") for block in blocks)
        mine = [block for block in blocks if block.startswith(f"  {setting.replace('__', '.')} = ")]
        assert any(words in block for block in mine), (path, mine)


def test_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(paths.os, "stat", refuse)  # root may enter any folder
    monkeypatch.setattr(paths.os, "access", lambda path, mode: Path(path) != tmp_path)
    assert paths.look(tmp_path / "a" / "b") == f"cannot be accessed: you have no permission in {tmp_path}"


def test_output_folder_too_long_for_a_run_folder_is_refused(tmp_path):
    base = "/".join([str(tmp_path), *["n" * 200] * 19])
    for length, fits in ((3800, True), (4090, False)):
        cfg = runnable(run__output_dir=(base + "/" + "m" * 250)[:length])
        found = [problem.why for problem in path_problems(cfg) if problem.key == "run.output_dir"]
        assert (found == []) == fits, found
