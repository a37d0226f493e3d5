"""With prefetch_teacher the objective gets each step's micro-batches one step ahead, and the run trains the same."""

import pytest

from kdtrain.errors import RunStopped
from tests.support.tiny_trainer import SEQUENCES, tiny_trainer


class Recorder:
    """Wraps an objective and an engine and records their calls with the samples."""

    def __init__(self, objective, engine):
        self.objective, self.events, self._step = objective, [], engine.step
        engine.step = self.step

    def prefetch(self, micro_batches):
        self.events.append(("prefetch", [int(batch.sample_ids[0]) for batch in micro_batches]))

    def __call__(self, batch, *, measure=False):
        self.events.append(("forward", int(batch.sample_ids[0])))
        return self.objective(batch, measure=measure)

    def step(self, lr):
        self.events.append(("optimizer", None))
        return self._step(lr)


def trained(folder, *, prefetch_teacher, steps=3):
    folder.mkdir()
    run = tiny_trainer(folder, steps, every=1, prefetch_teacher=prefetch_teacher)
    run.objective = Recorder(run.objective, run.engine)
    run.run()
    return run


def test_objective_gets_each_step_one_step_ahead_and_none_after_the_last(tmp_path):
    events = trained(tmp_path / "a", prefetch_teacher=True).objective.events
    first, second, third = [0, 2], [4, 6], [8, 10]
    steps = [("prefetch", first), ("prefetch", second), ("forward", 0), ("forward", 2), ("optimizer", None)]
    steps += [("prefetch", second), ("prefetch", third), ("forward", 4), ("forward", 6), ("optimizer", None)]
    assert events == [*steps, ("prefetch", third), ("forward", 8), ("forward", 10), ("optimizer", None)]
    events = trained(tmp_path / "b", prefetch_teacher=False).objective.events
    assert [what for what, _ in events] == ["prefetch", "forward", "forward", "optimizer"] * 3


def test_prefetching_changes_neither_weights_nor_the_position_of_checkpoints(tmp_path):
    ahead, plain = (trained(tmp_path / str(flag), prefetch_teacher=flag) for flag in (True, False))
    assert ahead.engine.weight.item() == plain.engine.weight.item() != 1.0
    for step in (1, 2, 3):
        (_, _, state, weight, _), (_, _, right, right_weight, _) = (r.checkpoints.saved[step] for r in (ahead, plain))
        assert state == right == {"position": step * SEQUENCES}
        assert weight.item() == right_weight.item()


def test_stop_request_without_a_signal_stops_the_run_with_its_first_reason(tmp_path):
    run = tiny_trainer(tmp_path, 5, prefetch_teacher=True)
    assert run.stop.reason == "another rank received a stop request"
    run.stop.request("a teacher stops")
    run.stop.request("too late")
    with pytest.raises(RunStopped, match=r"^stopped at step 0 \(a teacher stops\)"):
        run.run()


def test_micro_batches_that_were_taken_ahead_when_a_stop_arrives_are_not_lost_to_the_resumed_run(tmp_path):
    (tmp_path / "a").mkdir()
    run = tiny_trainer(tmp_path / "a", 5, every=None, prefetch_teacher=True)
    run.objective = Recorder(run.objective, run.engine)
    step = run.engine.step

    def stop_in_step_2(lr):
        if run.progress.step == 1:
            run.stop.request("in step 2")
        return step(lr)

    run.engine.step = stop_in_step_2
    with pytest.raises(RunStopped, match=r"^stopped at step 2"):
        run.run()
    assert run.batches.position == 3 * SEQUENCES, "step 3 was taken ahead"
    assert {n: saved[2] for n, saved in run.checkpoints.saved.items()} == {2: {"position": 2 * SEQUENCES}}
    (tmp_path / "b").mkdir()
    resumed = tiny_trainer(tmp_path / "b", 5, saved=run.checkpoints.saved[2], prefetch_teacher=True)
    resumed.run()
    plain = trained(tmp_path / "c", prefetch_teacher=False, steps=5)
    assert resumed.engine.weight.item() == plain.engine.weight.item()
