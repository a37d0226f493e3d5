"""Every published CPU table is made from its CSV, and no row has a wrong result."""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    **{"loss_head": "bench_loss_head", "packed": "bench_packed", "topk": "bench_topk"},
    **{"logit_store": "bench_logit_store"},
}
PUBLISHED = sorted(path.name.removesuffix("_cpu.csv") for path in (ROOT / "benchmarks/results").glob("*_cpu.csv"))


def test_the_loss_head_is_published_and_every_published_file_has_its_script():
    assert "loss_head" in PUBLISHED
    assert set(PUBLISHED) <= set(SCRIPTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table_is_made_from_the_published_measurements(name):
    bench, common = import_module(SCRIPTS[name]), import_module("measuring")
    assert ROOT / f"benchmarks/results/{name}_cpu.csv" == bench.RESULTS
    rows = common.read_csv(bench.RESULTS, "")
    assert bench.TABLE.read_text(encoding="utf-8") == bench.table_of(rows)
    for row in rows:
        assert bool(row["absent"]) != bool(row["median_ms"]), row
        error = row.get("error") or row.get("gradient_error")
        assert not error or float(error) <= bench.AGREEMENT, row


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "logit_store"])  # which has no naive rows
def test_published_ratios_refer_to_the_naive_row(name):
    bench, common = import_module(SCRIPTS[name]), import_module("measuring")
    rows = common.read_csv(bench.RESULTS, "")
    stripped = [{**row, "time_ratio": "", "peak_ratio": ""} for row in rows]
    assert common.with_ratios(stripped) == rows
