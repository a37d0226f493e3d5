"""The YAML files in configs/: each loads and is valid."""

import re
from pathlib import Path

import pytest

from kdtrain.config.checks import value_problems
from kdtrain.config.load import load_run
from kdtrain.models.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]


def declared():
    """(file, world size in its header) of every configuration that declares one."""
    found = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        size = re.search(r"^# world_size: (\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if size:
            found.append(pytest.param(path, int(size[1]), id=str(path.relative_to(ROOT / "configs"))))
    return found


def test_every_preset_outside_base_declares_its_world_size():
    assert len(declared()) >= 3
    headless = [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("base",)]
    assert len(headless) == len(declared()), "a configuration outside configs/base declares no world_size"


@pytest.mark.parametrize(("path", "world_size"), declared())
def test_preset_loads_and_is_valid_at_its_world_size(path, world_size, monkeypatch):
    for name in re.findall(r"\$\{oc\.env:(\w+)", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, "/somewhere")
    loaded = load_run([str(path)])
    assert value_problems(loaded.config, world_size=world_size) == []
    assert loaded.config.student.architecture is None or loaded.config.student.architecture in ARCHITECTURES


def test_base_presets_are_valid_with_the_settings_of_a_run(tmp_path):
    for path in (ROOT / "configs" / "base").glob("*.yaml"):
        run = tmp_path / "run.yaml"
        run.write_text(
            f"extends: {path}\nrun: {{name: a}}\nstudent: {{architecture: llama-5m}}\nteacher: {{weights: t}}\n"
            "data: {train: [a], validation: b}\ntrain: {total_tokens: 10_000_000_000}\n"
        )
        assert value_problems(load_run([str(run)]).config, world_size=8) == []
