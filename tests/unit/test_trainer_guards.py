"""The trainer's guards, in one process: steps that are not finite, loss spikes, slow data, slow ranks."""

import math
from dataclasses import asdict

import pytest
import torch

from kdtrain.batch import Batch
from kdtrain.config.schema import GuardSection
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import EXIT_NON_FINITE, NonFiniteLoss
from kdtrain.log import LOGGER
from kdtrain.stores.keys import KeySpace, SequenceKeys
from kdtrain.telemetry.jsonl_sink import JsonlSink
from kdtrain.training import guards
from kdtrain.training.guards import Events, Guards, SlowRanks, nan_if_nonfinite
from kdtrain.training.progress import Progress
from tests.support.tiny_trainer import CPU, adam_steps, records_of, tiny_trainer


@pytest.fixture
def warned(monkeypatch):
    messages = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *args: messages.append(text % args))
    return messages


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_first_nonfinite_step_ends_the_run_with_exit_code_4_and_names_its_samples(tmp_path, value):
    run = tiny_trainer(tmp_path, 9, {13: value})  # sample 13 is of step 4; its gradient alone would be finite
    with pytest.raises(NonFiniteLoss, match=r"^step 4: the gradient norm is nan; the step was not applied\n") as caught:
        run.run()
    assert caught.value.exit_code == EXIT_NON_FINITE
    assert "samples of data rank 0: [12, 13, 14, 15]" in str(caught.value)
    assert records_of(tmp_path / "skipped.jsonl") == [
        {"data/step": 4, "grad_norm": "nan", "sample_ids": [[12, 13, 14, 15]]}
    ]
    assert adam_steps(run) == 3
    assert run.checkpoints.saved == {}


def test_skipped_steps_change_only_the_data_position(tmp_path, warned):
    run = tiny_trainer(tmp_path, 9, {13: math.nan, 16: math.nan}, max_skipped_steps=2, spike_sigmas=None)
    before = {}

    def watched(lr, step=run.engine.step):
        before[run.progress.step + 1] = (run.engine.weight.item(), step(lr), run.engine.weight.item())
        return before[run.progress.step + 1][1]

    run.engine.step = watched
    run.run()
    assert [step for step, (old, result, new) in before.items() if not result.applied and old == new] == [4, 5]
    assert [step for step, (old, result, new) in before.items() if result.applied and old != new] == [
        1,
        2,
        3,
        6,
        7,
        8,
        9,
    ]
    assert (run.progress.step, adam_steps(run), run.progress.tokens_seen) == (9, 7, 9 * 32)
    assert (run.progress.skipped_steps, run.progress.skipped_in_row) == (2, 0)
    assert [r["data/step"] for r in records_of(tmp_path / "skipped.jsonl")] == [4, 5]
    assert [line.split("(")[1] for line in warned] == ["1 in a row, 1 in all)", "2 in a row, 2 in all)"]
    reports = records_of(tmp_path / "metrics.jsonl")
    assert [(r["data/step"], r["guard/skipped_steps"]) for r in reports] == [(1, 0), (3, 0), (6, 2), (9, 2)]
    assert all(1.9 < r["loss/total"] < 2.1 for r in reports), "a skipped step's loss must not enter the means"


def test_only_consecutive_skipped_steps_count_against_the_limit(tmp_path):
    spread = {4 * step: math.nan for step in (1, 3, 4, 6, 7)}  # samples of steps 2, 4, 5, 7 and 8
    (tmp_path / "a").mkdir()
    run = tiny_trainer(tmp_path / "a", 9, spread, max_skipped_steps=2)
    run.run()
    assert run.progress.skipped_steps == 5
    (tmp_path / "b").mkdir()
    run = tiny_trainer(tmp_path / "b", 9, {**spread, 20: math.nan}, max_skipped_steps=2)
    with pytest.raises(NonFiniteLoss, match=r"^step 6: the gradient norm is nan; the step, number 3 in a row, was not"):
        run.run()
    assert [r["data/step"] for r in records_of(tmp_path / "b/skipped.jsonl")] == [2, 4, 5, 6]


def test_samples_are_named_by_store_and_number_if_the_keys_are_known(tmp_path):
    one, two = SequenceKeys("a" * 64, "c" * 64), SequenceKeys("b" * 64, "c" * 64)
    ids = [two.key(3), one.key(8), two.key(1), one.key(5)]
    files = (JsonlSink(tmp_path / f"{name}.jsonl", resume_step=0, lazy=True) for name in ("skipped", "spikes"))
    keys, progress = KeySpace([("data/one", one), ("data/two", two)]), Progress(step=7)
    guards = Guards(GuardSection(max_skipped_steps=0), Mesh(), CPU, progress, Events(*files), keys)
    tokens = torch.ones(2, 8, dtype=torch.int64)
    batches = [Batch(tokens, tokens, tokens.float(), tokens, torch.tensor(part)) for part in (ids[:2], ids[2:])]
    with pytest.raises(NonFiniteLoss, match=r"samples of data rank 0: data/two \[3, 1\]; data/one \[8, 5\] \(all"):
        guards.skipped(batches, math.nan)
    guards.close()
    (record,) = records_of(tmp_path / "skipped.jsonl")
    assert record["sample_ids"] == [ids]
    assert record["samples"] == [{"data/two": [3, 1], "data/one": [8, 5]}]


SPIKY = {4 * 44: 2.5, 4 * 57 + 1: math.nan, 4 * 58: math.nan, 4 * 59: 3.5, 4 * 61: math.nan}


def outcome(folder, run):
    skipped, spikes, kept = (
        records_of(folder / f"{name}.jsonl") if (folder / f"{name}.jsonl").exists() else []
        for name in ("skipped", "spikes", "metrics")
    )
    progress = {**asdict(run.progress), "train_seconds": None}
    volatile = ("time/", "throughput/", "memory/")
    kept = [{k: v for k, v in r.items() if not k.startswith(volatile)} for r in kept]
    return run.engine.weight.item(), adam_steps(run), progress, skipped, spikes, kept


@pytest.mark.parametrize("stop", [20, 40, 50, 58, 59, 60])
def test_resumed_run_equals_the_uninterrupted_run_bitwise(tmp_path, stop):
    settings = {"max_skipped_steps": 2, "every": 1}
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole = tiny_trainer(folders[0], 70, SPIKY, **settings)
    whole.run()
    first = tiny_trainer(folders[1], 70, SPIKY, **settings)
    first.run()
    second = tiny_trainer(folders[1], 70, SPIKY, saved=first.checkpoints.saved[stop], **settings)
    assert second.progress.step == stop
    second.run()
    assert outcome(folders[1], second) == outcome(folders[0], whole)
    _, steps, progress, skipped, spikes, _ = outcome(folders[0], whole)
    assert (steps, progress["skipped_steps"]) == (67, 3)
    assert [r["data/step"] for r in skipped] == [58, 59, 62]
    assert [r["data/step"] for r in spikes] == [45, 60]


def test_recorded_spikes_do_not_depend_on_saves_and_reports(tmp_path):
    seen = []
    for every, log in ((1, 1), (7, 50), (None, 13)):
        folder = tmp_path / f"{every}"
        folder.mkdir()
        run = tiny_trainer(folder, 70, SPIKY, max_skipped_steps=2, every=every, log=log)
        run.run()
        seen.append((records_of(folder / "spikes.jsonl"), run.progress.recent_losses))
    assert seen[0] == seen[1] == seen[2]


def test_loss_spike_is_warned_of_once_with_its_samples_and_does_not_change_the_run(tmp_path, warned):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run, off = (
        tiny_trainer(tmp_path / name, 70, {4 * 44: 2.5}, spike_sigmas=sigmas)
        for name, sigmas in (("a", 6.0), ("b", None))
    )
    run.run()
    off.run()
    (line,) = warned
    assert line.startswith("spike    step 45: loss 2.1319, 21.0 standard deviations above the mean 2.0000")
    (record,) = records_of(tmp_path / "a/spikes.jsonl")
    assert record["sample_ids"] == [[176, 177, 178, 179]]
    assert not (tmp_path / "b/spikes.jsonl").exists()
    assert run.engine.weight.item() == off.engine.weight.item()
    assert len(run.progress.recent_losses) == 70


def test_window_holds_the_last_hundred_losses_and_few_losses_give_no_warning(tmp_path, warned):
    early = tiny_trainer(tmp_path, 130, {4 * 10: 9.0}, every=None)  # step 11: too few losses for a mean
    early.run()
    assert warned == []
    assert len(early.progress.recent_losses) == guards.WINDOW
    assert max(early.progress.recent_losses) < 2.1


def test_nan_if_nonfinite_keeps_the_gradients_of_a_finite_loss_bitwise():
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    for value, same in ((x.square().sum(), True), (x.square().sum() + math.inf, False)):
        (grad,) = torch.autograd.grad(nan_if_nonfinite(value), x)
        assert torch.equal(grad, 2 * x) if same else bool(grad.isnan().all())
        assert nan_if_nonfinite(value).dtype == value.dtype


def check(slow, progress, seconds, **phases):
    progress.step += 10
    progress.train_seconds += seconds
    return slow.check(phases)


def test_slow_data_is_warned_of_once_per_hundred_steps_but_not_in_the_first_report(warned):
    progress = Progress()
    slow = SlowRanks(0.1, Mesh(), CPU, progress)
    steps = []
    for _ in range(25):
        assert check(slow, progress, 10.0, data_wait=2.0, forward=3.0) == {}
        steps += [progress.step] * (len(warned) > len(steps))
    assert steps == [20, 120, 220]
    assert warned[0].startswith("slow     rank 0 on ")
    assert warned[0].endswith("waited for data in 20% of the steps' time (guard.data_wait_share = 0.1)")
    for share, wait in ((0.1, 0.9), (1.0, 10.0)):
        quiet = SlowRanks(share, Mesh(), CPU, Progress())
        for _ in range(3):
            check(quiet, quiet._progress, 10.0, data_wait=wait)
    assert len(warned) == 3


@pytest.mark.parametrize(
    ("own", "named"), [([1.0, 1.0, 1.6, 1.1], 2), ([1.0, 1.4, 1.0], None), ([0.01, 0.025, 0.01], None)]
)
def test_rank_slower_than_one_and_a_half_medians_is_warned_of(warned, own, named):
    slow = SlowRanks(0.1, Mesh(), CPU, Progress())
    slow._hosts = [f"host{rank}" for rank in range(len(own))]
    found = slow._check_time(own)
    assert found == {"time/slowest_over_median": pytest.approx(max(own) / sorted(own)[len(own) // 2], rel=0.06)}
    assert [line.split(" needs ")[0] for line in warned] == (
        [] if named is None else [f"slow     rank 2 on host{named}"]
    )
