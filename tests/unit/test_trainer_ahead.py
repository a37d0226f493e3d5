"""A trainer that looks ahead tells the objective of a step when the one before it begins, and learns the same."""

from pathlib import Path

import pytest

from kdtrain.errors import RunStopped
from kdtrain.testing.ranks import load_file

HELPERS = Path(__file__).with_name("test_trainer_guards.py")


class Diary:
    """Stands before an objective and notes what happens to which samples."""

    def __init__(self, objective, engine):
        self.objective, self.events, self._step = objective, [], engine.step
        engine.step = self.step

    def begin_step(self, micro_batches):
        self.events.append(("told", [int(batch.sample_ids[0]) for batch in micro_batches]))

    def __call__(self, batch, *, measure=False):
        self.events.append(("learns", int(batch.sample_ids[0])))
        return self.objective(batch, measure=measure)

    def step(self, lr):
        self.events.append(("optimizer", None))
        return self._step(lr)


def finished(folder, *, looks_ahead, steps=3):
    folder.mkdir()
    run = load_file(HELPERS).trainer(folder, steps, every=1)
    run.objective = Diary(run.objective, run.engine)
    run.looks_ahead = looks_ahead
    run.run()
    return run


def test_the_objective_is_told_of_each_step_one_step_ahead_and_of_none_after_the_last(tmp_path):
    events = finished(tmp_path / "a", looks_ahead=True).objective.events
    first, second, third = [0, 2], [4, 6], [8, 10]
    steps = [("told", first), ("told", second), ("learns", 0), ("learns", 2), ("optimizer", None)]
    steps += [("told", second), ("told", third), ("learns", 4), ("learns", 6), ("optimizer", None)]
    assert events == [*steps, ("told", third), ("learns", 8), ("learns", 10), ("optimizer", None)]
    events = finished(tmp_path / "b", looks_ahead=False).objective.events
    assert [what for what, _ in events] == ["told", "learns", "learns", "optimizer"] * 3


def test_looking_ahead_changes_neither_what_is_learned_nor_where_a_checkpoint_resumes(tmp_path):
    ahead, plain = (finished(tmp_path / str(flag), looks_ahead=flag) for flag in (True, False))
    assert ahead.engine.weight.item() == plain.engine.weight.item() != 1.0
    for step in (1, 2, 3):
        (_, _, sequences, weight, _), (_, _, right, right_weight, _) = (
            r.checkpoints.saved[step] for r in (ahead, plain)
        )
        assert sequences == right == step * load_file(HELPERS).SEQUENCES
        assert weight.item() == right_weight.item()


def test_a_request_to_stop_that_did_not_come_by_a_signal_is_obeyed_and_named(tmp_path):
    run = load_file(HELPERS).trainer(tmp_path, 5)
    run.looks_ahead = True
    assert run.stop.reason == "another rank was asked to stop"
    run.stop.ask("a teacher wants to")
    run.stop.ask("too late")
    with pytest.raises(RunStopped, match=r"^stopped at step 0 \(a teacher wants to\)"):
        run.run()
