"""What starting costs: a refused configuration imports no heavy package, a run no compiler of optimizers unused."""

import gc
import os
import subprocess
import sys
from pathlib import Path

from kdtrain.engine.process import import_muon
from kdtrain.imports import collector_paused

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "transformers", "deepspeed", "tokenizers", "safetensors", "rich", "wandb", "asyncio")
LISTED = f"""
import runpy, sys
sys.argv = ["launch/train.py", *sys.argv[1:]]
try:
    runpy.run_path("launch/train.py", run_name="__main__")
except SystemExit as end:
    print(end.code, *[name for name in {HEAVY!r} if name in sys.modules])
"""


def test_check_of_a_bad_file_imports_no_heavy_package(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text((ROOT / "configs/demo/distill_cpu.yaml").read_text() + "guard: {max_skiped_steps: 3}\n")
    command = [sys.executable, "-c", LISTED, str(bad), "--check", "optim.lr=-1"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "max_skiped_steps is not a setting" in done.stderr
    assert done.stdout.split() == ["2"]


def test_the_collector_is_paused_within_and_runs_afterwards():
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()


def test_muon_is_imported_without_the_compiler():
    code = (
        "import os, sys, deepspeed\n"
        "from kdtrain.engine.process import import_muon\n"
        "import_muon(os.environ)\n"
        "names = ('deepspeed.runtime.zero.muon.muon_optimizer', 'torch._inductor.compile_fx')\n"
        "print(*[name in sys.modules for name in names], 'TORCHDYNAMO_DISABLE' in os.environ)"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split()[-3:] == ["True", "False", "False"]


def test_a_value_set_by_the_user_is_restored():
    environ = {"TORCHDYNAMO_DISABLE": "0"}
    import_muon(environ)
    assert environ == {"TORCHDYNAMO_DISABLE": "0"}
