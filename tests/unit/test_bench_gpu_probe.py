"""The checks for a GPU: they pass on the CPU, and each one detects the fault it is made for."""

import csv
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch


@pytest.fixture
def setting():
    return import_module("gpu_common").Setting(torch.device("cpu"), Path(), True, False)


@pytest.fixture
def probe():
    return import_module("gpu_probe")


def run(probe, monkeypatch, out, *names):
    """The CSV after a run of these checks."""
    monkeypatch.setattr(sys, "argv", ["gpu_probe.py", *names, "--cpu", "--out", str(out)])
    probe.main()
    with (out / "dry_probe.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def verdicts(rows):
    return {row["name"]: row["verdict"] for row in rows}


def test_products_streams_and_snapshots_are_right_on_the_cpu(probe, monkeypatch, tmp_path):
    rows = run(probe, monkeypatch, tmp_path, "products", "streams", "snapshot")
    absent = {row["name"]: row["note"] for row in rows if row["verdict"] != "ok"}
    why = "nothing overlaps on the CPU"
    assert absent == {f"streams detects unrecorded {what}": why for what in ("inputs", "answers")}
    assert {row["shape"].split()[-1] for row in rows if row["name"] == "products d head"} == {
        f"n={columns}" for _, _, columns in probe.PRODUCTS
    }
    assert {row["name"].split()[0] for row in rows} == {"products", "streams", "snapshot"}
    assert {"commit", "date", "device", "versions", "value", "tolerance"} <= set(rows[0])


def test_rows_of_other_checks_are_kept(probe, monkeypatch, tmp_path):
    before = run(probe, monkeypatch, tmp_path, "streams")
    after = run(probe, monkeypatch, tmp_path, "snapshot")
    assert after[: len(before)] == before
    assert len(run(probe, monkeypatch, tmp_path, "streams")) == len(after)


def test_intermediate_rounding_of_a_product_fails(probe, monkeypatch, setting):
    right = probe.hidden_grad_into
    monkeypatch.setattr(probe, "hidden_grad_into", lambda *x: right(*x).bfloat16().float())
    found = list(probe.products(setting))
    assert {row["name"] for row in found if row["verdict"] == "FAIL"} == {"products d hidden"}


def test_unwritten_element_of_a_product_fails(probe, monkeypatch, setting):
    right = probe.logits_into

    def hole(out, x, w):
        right(out, x, w)[0, 3] = torch.nan
        return out

    monkeypatch.setattr(probe, "logits_into", hole)
    assert verdicts(probe.products(setting))["products logits"] == "FAIL"


class Late:
    """A side stream whose results were overwritten before they were read."""

    stream = None

    def start(self, work, inputs):
        answer = work()
        return lambda: answer.fill_(torch.nan)


def test_overwritten_results_are_counted(probe, setting):
    assert probe.wrong_rounds(setting, Late(), 10) == probe.ROUNDS
    assert probe.wrong_rounds(setting, probe.SideStream(setting.device), 10) == 0


def test_mutants_omit_one_of_the_two_record_stream_calls(probe, monkeypatch):
    class Recorded:
        device = "device"

        def __init__(self):
            self.streams = []

        def record_stream(self, stream):
            self.streams.append(stream)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    for record, recorded in ((probe.only_inputs, ["side"]), (probe.only_answers, ["current"])):
        tensor = Recorded()
        record(tensor, "side")  # as for an input of work on the side stream
        record(tensor, "current")  # as for an answer
        assert tensor.streams == recorded


def test_snapshot_that_aliases_its_sources_fails(probe, monkeypatch, setting):
    from kdtrain.engine import background

    class Alias:
        def __init__(self, device):
            self.parts = []

        def take(self, fragments):
            self.parts = [fragment.tensor for fragment in fragments]

        def data(self):
            return (memoryview(part.numpy()).cast("B") for part in self.parts)

    monkeypatch.setattr(background, "Snapshot", Alias)
    assert set(verdicts(probe.snapshot(setting)).values()) == {"FAIL"}


def test_gradients_rounded_in_place_match_rounding_afterwards(probe, monkeypatch, tmp_path):
    inplace = import_module("gpu_inplace")
    rows = run(probe, monkeypatch, tmp_path, "inplace")
    assert set(verdicts(rows).values()) == {"ok"}
    assert {row["name"].split()[1] for row in rows} == {"cross_entropy", "sparse", *inplace.TRITON_DIVERGENCES}
    columns = [n for _, n in inplace.SIZES]
    assert {row["shape"].split()[1] for row in rows} == {f"n={n}" for n in columns}
    assert {1, 262144} <= set(columns)


def test_one_wrong_element_of_a_gradient_is_detected(monkeypatch, setting):
    inplace = import_module("gpu_inplace")
    right = inplace.gradient_of

    def wrong(setting, backend, name, *more):
        make = right(setting, backend, name, *more)

        def once(s, t, dtype):
            gradient = make(s, t, dtype)
            if dtype == torch.bfloat16 and name == "tvd":
                gradient[2, 77] *= 1.01
            return gradient

        return once

    monkeypatch.setattr(inplace, "gradient_of", wrong)
    monkeypatch.setattr(inplace, "SIZES", ((4, 300),))
    failed = [row for row in inplace.inplace(setting) if row["verdict"] == "FAIL"]
    assert [(row["name"], row["value"]) for row in failed] == [("inplace tvd torch", "2")]  # in each of two maps


def test_every_available_implementation_separates_packed_documents(probe, monkeypatch, tmp_path):
    from kdtrain.models.attention import IMPLEMENTATIONS

    rows = run(probe, monkeypatch, tmp_path, "packed")
    found = verdicts(rows)
    assert {name.split()[1] for name in found} == {"auto", *IMPLEMENTATIONS}
    for implementation in ("eager", "sdpa"):
        checks = [found[f"packed {implementation} {what}"] for what in ("leak", "alone", "gradient", "MiB")]
        assert checks == ["ok"] * 4
    assert found["packed flash_attention_2"] == "absent"


def test_documents_that_attend_to_each_other_fail(monkeypatch, setting):
    packed = import_module("gpu_packed")
    right = packed.hidden
    monkeypatch.setattr(packed, "IMPLEMENTATIONS", ("sdpa",))
    monkeypatch.setattr(packed, "hidden", lambda backbone, *documents: right(backbone, torch.cat(documents, 1)))
    found = verdicts(packed.packed(setting))
    assert [found[f"packed sdpa {what}"] for what in ("leak", "alone", "gradient")] == ["FAIL"] * 3


def test_implementation_that_cannot_be_built_fails_instead_of_being_absent(monkeypatch, setting):
    packed = import_module("gpu_packed")
    monkeypatch.setattr(packed, "IMPLEMENTATIONS", ("sdpa",))

    def refuses(*arguments, **settings):
        raise packed.ConfigError("it leaks")

    monkeypatch.setattr(packed, "load_backbone", refuses)
    assert verdicts(packed.packed(setting))["packed sdpa"] == "FAIL"


def test_exception_in_an_implementation_is_a_row_and_the_next_one_runs(monkeypatch, setting):
    packed = import_module("gpu_packed")
    right = packed.examined

    def raises(setting, name, backbone):
        if name == "packed packed":
            raise RuntimeError("no kernel image")
        yield from right(setting, name, backbone)

    monkeypatch.setattr(packed, "examined", raises)
    monkeypatch.setattr(packed, "kernels_of", lambda *_: 1 / 0)
    found = list(packed.packed(setting))
    assert [(row["name"], row["verdict"], row["note"]) for row in found[1:2]] == [
        ("packed packed", "FAIL", "RuntimeError: no kernel image"),
    ]
    notes = {row["name"]: row["note"] for row in found if row["verdict"] == "ok"}
    assert notes["packed sdpa MiB"] == "kernels: ZeroDivisionError: division by zero"


def test_exception_in_a_check_is_a_row_and_the_next_one_runs(probe, monkeypatch, tmp_path):
    def raises(setting):
        yield probe.check("products first", "", 0.0, 0.0)
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(probe.CHECKS, "products", raises)
    with pytest.raises(SystemExit, match="1 of 4 failed, first products RuntimeError: illegal memory access"):
        run(probe, monkeypatch, tmp_path, "products", "snapshot")
    with (tmp_path / "dry_probe.csv").open(encoding="utf-8", newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == ["ok", "FAIL", "ok", "ok"]


def test_an_unknown_check_is_refused(probe, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(probe, monkeypatch, tmp_path, "stream")
    assert "no check stream; there are products, streams, snapshot, packed, inplace" in capsys.readouterr().err
