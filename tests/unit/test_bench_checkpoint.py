"""The checkpoint benchmark: its measurement runs, and its table is made from its CSV."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEASURE = """
import json, sys
from pathlib import Path
import bench_checkpoint
print(json.dumps(bench_checkpoint.measure(sys.argv[1], Path(sys.argv[2]), rounds=1)))
"""


@pytest.mark.slow
@pytest.mark.deepspeed
def test_one_round_of_a_tiny_model_saves_in_both_modes_and_keeps_one_checkpoint(tmp_path):
    from kdtrain.models.tiny import tiny_config

    (tmp_path / "student.json").write_text(json.dumps(tiny_config("smollm")))
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks")))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "student.json"), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    size, table = json.loads(done.stdout.splitlines()[-1])
    (kept,) = (tmp_path / "saved").iterdir()
    assert size == sum(file.stat().st_size for file in kept.glob("*.safetensors"))
    assert list(table) == ["alone", "at once", "behind"]
    assert table["alone"]["stall_s"] == 0.0 < min(table[mode]["stall_s"] for mode in ("at once", "behind"))
    assert table["behind"]["stall_s"] < table["behind"]["on_disk_s"]
    assert all(values["step_s"] > 0 for values in table.values())


def test_the_table_shows_every_row_of_the_csv():
    bench = import_module("bench_checkpoint")
    values = {"stall_s": 1.5, "on_disk_s": 2.0, "step_s": 0.25, "first_stall_s": 3.0}
    rows = bench.rows_of("m", 3 << 30, {"at once": values, "behind": values | {"stall_s": 0.125}}, "a machine")
    assert set(rows[0]) == set(bench.COLUMNS)
    text = bench.table_of(rows)
    assert "| m | 3.00 | at once | 1.5 | 2 | 0.25 | 3 |" in text
    assert "| m | 3.00 | behind | 0.125 | 2 | 0.25 | 3 |" in text


def test_the_published_table_is_made_from_the_published_csv():
    bench, common = import_module("bench_checkpoint"), import_module("measuring")
    rows = common.read_csv(bench.RESULTS / "cpu_checkpoint.csv", "")
    assert (bench.TABLES / "checkpoint_cpu.md").read_text(encoding="utf-8") == bench.table_of(rows)
