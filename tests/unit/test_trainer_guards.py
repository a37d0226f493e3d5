"""The trainer's guards, in process: steps that are not finite, jumps of the loss, slow data, files that are refused."""

import json
import math
import resource
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.collectives import reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.zero import StepResult
from kdtrain.errors import EXIT_NON_FINITE, EXIT_OTHER, NonFiniteLoss, OutputError
from kdtrain.log import LOGGER, setup_logging
from kdtrain.objectives.base import LossOutput
from kdtrain.run_state.heartbeat import PhaseTracker
from kdtrain.run_state.run_folder import RunFolder, read_status
from kdtrain.telemetry.jsonl_sink import JsonlSink
from kdtrain.training import guards
from kdtrain.training.cadence import StopRequest
from kdtrain.training.guards import Events, Guards, SlowRanks, poisoned
from kdtrain.training.progress import Progress
from kdtrain.training.report import Costs, Reporter
from kdtrain.training.timing import PhaseTimer
from kdtrain.training.trainer import Trainer

CPU = torch.device("cpu")
ALONE = Mesh()
SEQUENCES, SEQ_LEN = 4, 8


class Loader:
    """Steps of two micro-batches of two sequences per data rank; sample ids count up."""

    def __init__(self, mesh, position=0):
        self.position, self.mesh = position, mesh

    def __iter__(self):
        return self

    def __next__(self):
        first = self.position + self.mesh.dp_rank * SEQUENCES
        self.position += self.mesh.dp_size * SEQUENCES
        ids = torch.ones(2, SEQ_LEN, dtype=torch.int64)
        return [Batch(ids, ids, ids.float(), ids, torch.arange(start, start + 2)) for start in (first, first + 2)]


class Engine:
    """Adam on one weight; like the real one, applies no step whose gradient is not finite."""

    def __init__(self, mesh):
        self.mesh = mesh
        self.weight = torch.nn.Parameter(torch.tensor([1.0]))
        self.adam = torch.optim.Adam([self.weight])

    def backward(self, loss, tokens):
        (loss / tokens).backward()

    def step(self, lr):
        norm = float(reduce_sum_(self.weight.grad, self.mesh.dp_group).norm())
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
        self.adam.zero_grad()
        return StepResult(norm, math.isfinite(norm))


class Objective:
    """About 2 nats per token, or what `values` says of a sample; the gradient depends on the data and is finite."""

    def __init__(self, engine, values):
        self.engine, self.values = engine, values

    def begin_step(self, micro_batches):
        pass

    def __call__(self, batch, *, measure=False):
        count = batch.num_valid_tokens()
        noise = [0.01 * math.sin(13.0 * sample) for sample in batch.sample_ids.tolist()]
        value = sum(self.values.get(s, 2.0 + n) for s, n in zip(batch.sample_ids.tolist(), noise, strict=True)) / 2
        loss = (self.engine.weight * noise[0] - (self.engine.weight * noise[0]).detach()).sum() + value
        return LossOutput(loss * count, {"loss/total": (loss.detach() * count, count)})


class Checkpoints:
    """Keeps what a checkpoint would, through JSON as the real one does."""

    def __init__(self):
        self.saved = {}

    busy = False

    def advance(self):
        pass

    def finish(self):
        pass

    def save(self, engine, progress, loader, sequences, *, wait=True):
        weight = engine.weight.detach().clone()
        moments = {k: v.clone() for k, v in engine.adam.state_dict()["state"].get(0, {}).items()}
        known = json.loads(json.dumps(asdict(progress)))
        self.saved[progress.step] = (known, engine.adam.state_dict(), sequences, weight, moments)


def trainer(folder, steps, values=(), *, mesh=ALONE, saved=None, every=10, log=3, **settings):
    """A run of `steps` steps, maybe resumed from what a Checkpoints kept."""
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.tokens_per_step = SEQ_LEN, mesh.dp_size * SEQUENCES * SEQ_LEN
    cfg.train.total_tokens = steps * cfg.data.tokens_per_step
    cfg.log.every_steps, cfg.checkpoint.every_steps = log, every
    cfg.guard.data_wait_share = 1.0  # steps of microseconds wait for anything
    for name, value in settings.items():
        setattr(cfg.guard, name, value)
    progress, engine, loader = Progress(), Engine(mesh), Loader(mesh)
    if saved is not None:
        known, adam, sequences, weight, moments = saved
        progress, loader = Progress(**known), Loader(mesh, sequences)
        engine.weight.data.copy_(weight)
        state = {0: {k: v.clone() for k, v in moments.items()}} if moments else {}
        engine.adam.load_state_dict({**adam, "state": state})
    sinks, events = [], None
    if mesh.is_main:
        files = (JsonlSink(folder / f"{n}.jsonl", resume_step=progress.step, lazy=True) for n in ("skipped", "spikes"))
        sinks, events = [JsonlSink(folder / "metrics.jsonl", resume_step=progress.step)], Events(*files)
    reporter = Reporter(sinks, mesh, CPU, Costs(1.0), steps)
    reporter.resumed(progress)
    return Trainer(
        cfg=cfg,
        mesh=mesh,
        device=CPU,
        engine=engine,
        objective=Objective(engine, dict(values)),
        loader=loader,
        evaluator=SimpleNamespace(run=lambda p: None),
        checkpoints=Checkpoints(),
        reporter=reporter,
        guards=Guards(cfg.guard, mesh, CPU, progress, events),
        timer=PhaseTimer(CPU, PhaseTracker(mesh.rank)),
        stop=StopRequest(),
        progress=progress,
    )


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def warned(monkeypatch):
    messages = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *args: messages.append(text % args))
    return messages


def adam_steps(run):
    return int(run.engine.adam.state_dict()["state"][0]["step"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_by_default_the_first_step_that_is_not_finite_ends_the_run_with_4_and_its_samples(tmp_path, value):
    run = trainer(tmp_path, 9, {13: value})  # sample 13 is of step 4; its gradient alone would be finite
    with pytest.raises(NonFiniteLoss, match=r"^step 4: the gradient norm is nan; the step was not applied\n") as caught:
        run.run()
    assert caught.value.exit_code == EXIT_NON_FINITE
    assert "samples of data rank 0: [12, 13, 14, 15]" in str(caught.value)
    assert records(tmp_path / "skipped.jsonl") == [
        {"data/step": 4, "grad_norm": "nan", "sample_ids": [[12, 13, 14, 15]]}
    ]
    assert adam_steps(run) == 3
    assert run.checkpoints.saved == {}


def test_skipped_steps_change_nothing_but_the_position_in_the_data(tmp_path, warned):
    run = trainer(tmp_path, 9, {13: math.nan, 16: math.nan}, max_skipped_steps=2, spike_sigmas=None)
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
    assert [r["data/step"] for r in records(tmp_path / "skipped.jsonl")] == [4, 5]
    assert [line.split("(")[1] for line in warned] == ["1 in a row, 1 in all)", "2 in a row, 2 in all)"]
    reports = records(tmp_path / "metrics.jsonl")
    assert [(r["data/step"], r["guard/skipped_steps"]) for r in reports] == [(1, 0), (3, 0), (6, 2), (9, 2)]
    assert all(1.9 < r["loss/total"] < 2.1 for r in reports), "a skipped step's loss must not enter the means"


def test_only_consecutive_steps_count_against_the_limit(tmp_path):
    spread = {4 * step: math.nan for step in (1, 3, 4, 6, 7)}  # samples of steps 2, 4, 5, 7 and 8
    (tmp_path / "a").mkdir()
    run = trainer(tmp_path / "a", 9, spread, max_skipped_steps=2)
    run.run()
    assert run.progress.skipped_steps == 5
    (tmp_path / "b").mkdir()
    run = trainer(tmp_path / "b", 9, {**spread, 20: math.nan}, max_skipped_steps=2)
    with pytest.raises(NonFiniteLoss, match=r"^step 6: the gradient norm is nan; the step, number 3 in a row, was not"):
        run.run()
    assert [r["data/step"] for r in records(tmp_path / "b/skipped.jsonl")] == [2, 4, 5, 6]


SPIKY = {4 * 44: 2.5, 4 * 57 + 1: math.nan, 4 * 58: math.nan, 4 * 59: 3.5, 4 * 61: math.nan}


def ended(folder, run):
    skipped, spikes, kept = (
        records(folder / f"{name}.jsonl") if (folder / f"{name}.jsonl").exists() else []
        for name in ("skipped", "spikes", "metrics")
    )
    progress = {**asdict(run.progress), "train_seconds": None}
    volatile = ("time/", "throughput/", "memory/")
    kept = [{k: v for k, v in r.items() if not k.startswith(volatile)} for r in kept]
    return run.engine.weight.item(), adam_steps(run), progress, skipped, spikes, kept


@pytest.mark.parametrize("stop", [20, 40, 50, 58, 59, 60])
def test_resumed_anywhere_is_exactly_uninterrupted(tmp_path, stop):
    settings = {"max_skipped_steps": 2, "every": 1}
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole = trainer(folders[0], 70, SPIKY, **settings)
    whole.run()
    first = trainer(folders[1], 70, SPIKY, **settings)
    first.run()
    second = trainer(folders[1], 70, SPIKY, saved=first.checkpoints.saved[stop], **settings)
    assert second.progress.step == stop
    second.run()
    assert ended(folders[1], second) == ended(folders[0], whole)
    _, steps, progress, skipped, spikes, _ = ended(folders[0], whole)
    assert (steps, progress["skipped_steps"]) == (67, 3)
    assert [r["data/step"] for r in skipped] == [58, 59, 62]
    assert [r["data/step"] for r in spikes] == [45, 60]


def test_saves_between_reports_do_not_change_what_is_seen_of_the_losses(tmp_path):
    seen = []
    for every, log in ((1, 1), (7, 50), (None, 13)):
        folder = tmp_path / f"{every}"
        folder.mkdir()
        run = trainer(folder, 70, SPIKY, max_skipped_steps=2, every=every, log=log)
        run.run()
        seen.append((records(folder / "spikes.jsonl"), run.progress.recent_losses))
    assert seen[0] == seen[1] == seen[2]


def test_a_jump_of_the_loss_is_one_warning_with_its_samples_and_changes_nothing(tmp_path, warned):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run, off = (
        trainer(tmp_path / name, 70, {4 * 44: 2.5}, spike_sigmas=sigmas) for name, sigmas in (("a", 6.0), ("b", None))
    )
    run.run()
    off.run()
    (line,) = warned
    assert line.startswith("spike    step 45: loss 2.1319, 21.0 standard deviations above the mean 2.0000")
    (record,) = records(tmp_path / "a/spikes.jsonl")
    assert record["sample_ids"] == [[176, 177, 178, 179]]
    assert not (tmp_path / "b/spikes.jsonl").exists()
    assert run.engine.weight.item() == off.engine.weight.item()
    assert len(run.progress.recent_losses) == 70


def test_the_window_is_the_last_hundred_losses_and_few_losses_raise_no_alarm(tmp_path, warned):
    early = trainer(tmp_path, 130, {4 * 10: 9.0}, every=None)  # step 11: nothing is known yet
    early.run()
    assert warned == []
    assert len(early.progress.recent_losses) == guards.WINDOW
    assert max(early.progress.recent_losses) < 2.1


def test_the_factor_that_poisons_is_exactly_one_for_a_finite_loss():
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    for value, same in ((x.square().sum(), True), (x.square().sum() + math.inf, False)):
        (grad,) = torch.autograd.grad(poisoned(value), x)
        assert torch.equal(grad, 2 * x) if same else bool(grad.isnan().all())
        assert poisoned(value).dtype == value.dtype


def look(slow, progress, seconds, **phases):
    progress.step += 10
    progress.train_seconds += seconds
    return slow.look(phases)


def test_slow_data_is_warned_of_after_the_first_report_and_once_per_hundred_steps(warned):
    progress = Progress()
    slow = SlowRanks(0.1, Mesh(), CPU, progress)
    steps = []
    for _ in range(25):
        assert look(slow, progress, 10.0, data_wait=2.0, forward=3.0) == {}
        steps += [progress.step] * (len(warned) > len(steps))
    assert steps == [20, 120, 220]
    assert warned[0].startswith("slow     rank 0 on ")
    assert warned[0].endswith("waited for data in 20% of the steps' time (guard.data_wait_share = 0.1)")
    for share, wait in ((0.1, 0.9), (1.0, 10.0)):
        quiet = SlowRanks(share, Mesh(), CPU, Progress())
        for _ in range(3):
            look(quiet, quiet._progress, 10.0, data_wait=wait)
    assert len(warned) == 3


@pytest.mark.parametrize(
    ("own", "named"), [([1.0, 1.0, 1.6, 1.1], 2), ([1.0, 1.4, 1.0], None), ([0.01, 0.025, 0.01], None)]
)
def test_a_rank_half_slower_than_the_median_is_named(warned, own, named):
    slow = SlowRanks(0.1, Mesh(), CPU, Progress())
    slow._hosts = [f"host{rank}" for rank in range(len(own))]
    found = slow._straggler(own)
    assert found == {"time/slowest_over_median": pytest.approx(max(own) / sorted(own)[len(own) // 2], rel=0.06)}
    assert [line.split(" needs ")[0] for line in warned] == (
        [] if named is None else [f"slow     rank 2 on host{named}"]
    )


@contextmanager
def full_disk(limit):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("full", ["metrics.jsonl", "console.log", "skipped.jsonl"])
def test_a_full_disk_ends_the_run_at_the_next_step_with_one_message_and_1(tmp_path, full, capsys):
    """The file that meets the limit is long beforehand; the others stay below it."""
    long = json.dumps({"data/step": 0, "x": "x" * 5000}) + "\n"
    ended_at = []

    def work():
        with RunFolder.open(tmp_path, "run") as folder:
            if full == "console.log":
                (folder.path / full).write_text(long)
            setup_logging(0, folder.path)
            run = trainer(folder.path, 60, {20: math.nan}, max_skipped_steps=1, log=30, every=None)
            if full != "console.log":
                (folder.path / full).write_text(long)
            with full_disk(len(long)):
                try:
                    run.run()
                finally:
                    ended_at.append(run.progress.step)
                    run.close(failed=True)

    try:
        with pytest.raises(OutputError) as caught:
            work()
    finally:
        setup_logging(0)
    path = tmp_path / "run" / full
    assert str(caught.value).startswith(f"cannot write {path}: [Errno 27] File too large\n  why: ")
    assert (caught.value.exit_code, ended_at) == (EXIT_OTHER, [6 if full == "skipped.jsonl" else 1])
    assert "Logging error" not in capsys.readouterr().err
    assert read_status(tmp_path / "run") == ("failed", f"OutputError: cannot write {path}: [Errno 27] File too large")
    assert not (tmp_path / "run/LOCK").exists()
    if full != "console.log":  # a log's line waits in memory until the handler goes
        assert path.read_text() == long


def test_a_report_of_the_last_step_that_is_refused_is_an_error_too(tmp_path):
    run = trainer(tmp_path, 1, every=None)
    with full_disk(10), pytest.raises(OutputError, match=r"metrics\.jsonl"):
        run.run()
    assert run.progress.step == 1


def test_a_refused_record_is_told_again_at_the_end_unless_the_run_has_failed(tmp_path):
    for failed in (True, False):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        with full_disk(10):
            with pytest.raises(OutputError, match="cannot write"):
                sink.write({"data/step": 1, "loss/total": 2.0})
            if failed:
                sink.close(failed=True)
            else:
                with pytest.raises(OutputError, match="cannot write"):
                    sink.close()
        assert sink._file.closed


def test_a_status_that_cannot_be_written_does_not_hide_why_the_run_ended(tmp_path, warned):
    def work():
        with RunFolder.open(tmp_path, "run"):
            raise NonFiniteLoss("step 3")

    folder = tmp_path / "run"
    write = RunFolder.set_status

    def on_a_full_disk(self, state, reason=""):
        with full_disk(refusals[state]):
            write(self, state, reason)

    refusals = {"running": 4096, "failed": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "set_status", on_a_full_disk)
        with pytest.raises(NonFiniteLoss, match="step 3"):
            work()
    assert warned == [f"{folder / 'STATUS'} could not be changed from running: File too large"]
    assert read_status(folder)[0] == "running"
    assert [p.name for p in folder.iterdir()] == ["STATUS"]


def test_a_status_that_cannot_be_written_is_an_error_when_the_run_is_done(tmp_path):
    folder = RunFolder.open(tmp_path, "run")
    with full_disk(0), pytest.raises(OutputError, match=r"cannot write .*STATUS: \[Errno 27\]"):
        folder.mark_done()
    assert read_status(tmp_path / "run")[0] == "running"
    folder.mark_done()
    assert read_status(tmp_path / "run")[0] == "done"
    folder.close()
