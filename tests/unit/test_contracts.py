import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lint_imports(folder):
    tool = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if tool is None:
        pytest.skip("import-linter is not installed (pip install -e .[dev])")
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder / 'kernels'}"}
    return subprocess.run(
        [tool, "--no-cache"], cwd=folder, env=env, capture_output=True, text=True, timeout=100, check=False
    )


def test_layers_and_doors_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("kdtrain/losses/planted.py", "import kdtrain.training", "layers"),
        ("kdtrain/losses/planted.py", "import deepspeed", "deepspeed only in kdtrain.engine"),
        ("kdtrain/engine/planted.py", "import transformers", "transformers only in kdtrain.models"),
        ("kdtrain/config/planted.py", "import omegaconf", "omegaconf only in kdtrain.config.load"),
        ("kdtrain/config/planted.py", "import torch", "configuration needs no torch"),
        ("kdtrain/config/schema/types.py", "import kdtrain.config.schema.teacher", "no cycles"),
        ("kdtrain/telemetry/planted.py", "import wandb", "wandb only in kdtrain.telemetry.wandb_sink"),
        ("kdtrain/losses/planted.py", "import triton", "triton only in kdtrain_kernels.triton"),
        ("kernels/kdtrain_kernels/planted.py", "import kdtrain.log", "kernels know nothing of kdtrain"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, line, contract):
    for name in ("kdtrain", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / file).write_text(f'"""Planted."""\n\n{line}\n')
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert f"{contract} BROKEN" in done.stdout


def imported_names(source):
    """Names that a module imports from kdtrain."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes if (node.module or "").startswith("kdtrain") for alias in node.names}


def test_only_config_and_jobs_import_the_whole_configuration():
    readers = {
        path.relative_to(ROOT / "kdtrain").parts[0]
        for path in (ROOT / "kdtrain").rglob("*.py")
        if imported_names(path.read_text(encoding="utf-8")) & {"RunConfig", "Request", "load_run"}
    }
    assert readers == {"config", "jobs"}


def test_import_of_the_whole_configuration_inside_a_function_is_found():
    assert "RunConfig" in imported_names("def f():\n    from kdtrain.config.schema import RunConfig, ZeroSection")
