"""The import benchmark: a tiny run compares three equal stores and states both goals."""

import sys
from importlib import import_module

import pytest

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"), pytest.mark.slow]


@pytest.fixture(scope="module")
def bench():
    return import_module("bench_import")


@pytest.fixture(scope="module")
def rows(bench, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(bench, "VOCAB", 300)
    patch.setattr(bench, "RUNS", 1)
    folder = tmp_path_factory.mktemp("import")
    try:
        yield folder, bench.measure_all(folder, 40_000, 30_000)
    finally:
        patch.undo()


def test_a_tiny_run_measures_every_provider_and_compares_their_stores(bench, rows):
    folder, measured = rows
    small, large = (f"{tokens} tokens of uint16, V=300, documents of 500" for tokens in (30_000, 40_000))
    shapes = [small] * 3 + [large] * 2
    assert [(row["shape"], row["provider"]) for row in measured] == list(
        zip(shapes, ["naive", "blocks", "in place", "blocks", "in place"], strict=True)
    )
    assert all(set(row) == set(bench.COLUMNS) for row in measured)
    assert all(0 < float(row["p20_s"]) <= float(row["median_s"]) <= float(row["p80_s"]) for row in measured)
    bench.check_equal(folder / "30000")
    copied = folder / "30000/blocks/train/shard_00000.bin"
    data = bytearray(copied.read_bytes())
    data[7] ^= 1
    copied.write_bytes(data)
    with pytest.raises(SystemExit, match=r"blocks: shard_00000\.bin differs"):
        bench.check_equal(folder / "30000")


def test_both_goals_replace_their_rows_and_keep_others(bench, rows, tmp_path):
    measured = [{**row, "tokens_per_s": rate} for row, rate in zip(rows[1], ("2", "50", "9", "8", "7"), strict=True)]
    goals = bench.goals_of(measured)
    assert [(g["name"], g["measured"], g["goal"], g["better"]) for g in goals] == [
        ("import_megatron_in_place_seconds_1e8", measured[-1]["median_s"], "1", "lower"),
        ("import_megatron_copy_speedup", "25", "4", "higher"),
    ]
    file = tmp_path / "goals.csv"
    header = "name,measured,goal,better,commit,date,command\n"
    file.write_text(f"{header}other,1,2,lower,c,d,e\nimport_megatron_copy_speedup,1,4,higher,c,d,e\n")
    bench.write_goals(file, goals)
    lines = file.read_text().splitlines(keepends=True)
    assert lines[0] == header
    assert [line.split(",")[0] for line in lines[1:]] == ["other", *(goal["name"] for goal in goals)]


def test_nothing_is_published_on_a_busy_machine(bench, monkeypatch):
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (0.51, 0.0, 0.0))
    monkeypatch.setattr(bench, "QUIET_WITHIN_S", 0.0)
    monkeypatch.setattr(bench, "measure_all", lambda *sizes: pytest.fail("measured on a busy machine"))
    monkeypatch.setattr(sys, "argv", ["bench_import.py"])
    with pytest.raises(SystemExit, match=r"the load is 0\.51, above 0\.5"):
        bench.main()
