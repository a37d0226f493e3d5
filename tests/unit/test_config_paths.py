"""What is said of paths that cannot even be looked at."""

import errno
from pathlib import Path

import pytest

from kdtrain.config import paths, validate
from kdtrain.config.load import Loaded
from kdtrain.config.schema import RunConfig
from kdtrain.errors import ConfigError


def configuration(**changes):
    """Defaults, then changed: dotted keys with __ for the dots."""
    cfg = RunConfig()
    cfg.run.name, cfg.train.total_tokens = "a", 1 << 30
    for name, value in changes.items():
        section, leaf = name.split("__")
        setattr(getattr(cfg, section), leaf, value)
    return cfg


def unusable_paths(tmp_path):
    """Path -> what is said of it, wherever it stands."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "plain").write_text("")
    return {
        "x" * 300: "holds a name of 300 bytes, longer than the 255 that a file name may have",
        str(tmp_path / ("é" * 128) / "y"): "holds a name of 256 bytes",
        "/".join(["z" * 100] * 50): "has 5049 bytes, more than the 4095 of a path",
        str(tmp_path / "loop"): "symbolic links that go in a circle",
        str(tmp_path / "loop" / "below"): "symbolic links that go in a circle",
        str(tmp_path / "dangling"): f"is a symbolic link to {'nothing'}, which does not exist",
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
def test_a_path_that_cannot_be_looked_at_is_a_problem_of_its_setting_among_all_others(setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, words in unusable_paths(tmp_path).items():
        cfg = configuration(**{setting: [path] if setting == "data__train" else path, "optim__lr": -1.0})
        with pytest.raises(ConfigError) as caught:
            validate.check(Loaded(cfg, {}), world_size=4)
        blocks = str(caught.value).split("\n\n")
        assert any(block.startswith("  optim.lr = -1.0") for block in blocks)
        mine = [block for block in blocks if block.startswith(f"  {setting.replace('__', '.')} = ")]
        assert any(words in block for block in mine), (path, mine)


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(paths.os, "stat", refuse)  # root may enter any folder
    monkeypatch.setattr(paths.os, "access", lambda path, mode: Path(path) != tmp_path)
    assert paths.look(tmp_path / "a" / "b") == f"cannot be looked at: you have no permission in {tmp_path}"


def test_a_run_folder_that_leaves_no_room_for_what_is_written_there_is_refused(tmp_path):
    base = "/".join([str(tmp_path), *["n" * 200] * 19])
    for length, fits in ((3800, True), (4090, False)):
        cfg = configuration(run__output_dir=(base + "/" + "m" * 250)[:length])
        found = [problem.why for problem in paths.missing_paths(cfg) if problem.key == "run.output_dir"]
        assert (found == []) == fits, found
