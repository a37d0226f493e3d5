"""data.sequence_prefix in whole runs: measured once, kept in checkpoint and export, used in validation."""

import json

import pytest

from tests.support.bos_models import BOS, write_bos_run
from tests.support.launching import end_ranks, numbers_of, start_ranks

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_bos_run(tmp_path_factory.mktemp("bos"))


def start(config, *words, script="train.py", ranks=1):
    return start_ranks(script, config, *words, ranks=ranks)


def end(processes):
    """(exit codes, stdout of rank 0, stderr of each rank)"""
    ended = end_ranks(processes)
    return [rank.code for rank in ended], ended[0].out, [rank.err for rank in ended]


def records(config, name):
    return numbers_of(config.parent / "runs" / name)


def prefix_lines(config, name):
    lines = (config.parent / "runs" / name / "console.log").read_text().splitlines()
    return [line for line in lines if line.startswith("prefix ")]


@pytest.fixture(scope="module")
def whole(config):
    codes, out, errors = end(start(config, "run.name=whole"))
    assert codes == [0], errors
    return config.parent / "runs/whole", out


def test_prefix_is_measured_once_and_kept_in_checkpoint_and_export(config, whole):
    run, out = whole
    (line,) = prefix_lines(config, "whole")
    assert line.startswith("prefix   '<bos>' (id 257): teacher's nll ")
    assert line in out
    (saved,) = run.glob("checkpoints/step_000004/checkpoint.json")
    assert json.loads(saved.read_text())["state"]["loader"]["packing"]["sequence_prefix"] == [BOS]
    assert json.loads((run / "export/kdtrain.json").read_text())["sequence_prefix"] == [BOS]
    last = records(config, "whole")[-1]
    assert last["data/tokens_seen"] == 4 * 192, "positions of the prefix are seen, too"
    assert last["eval/teacher_nll"] < 1, "validation has the prefix, without which the teacher is at 8 nats"


def test_resumed_run_takes_the_prefix_of_its_checkpoint_and_refuses_another(config, whole):
    codes, _, errors = end(start(config, "run.name=parts", "run.time_limit_s=0.001"))
    assert codes == [75], errors
    codes, _, (error,) = end(start(config, "run.name=parts", "data.sequence_prefix=none"))
    assert codes == [3]
    assert "differs in data.sequence_prefix (ids): [257] in the checkpoint, [] here" in error
    codes, _, errors = end(start(config, "run.name=parts"))
    assert codes == [0], errors
    assert records(config, "parts") == records(config, "whole")
    assert len(prefix_lines(config, "parts")) == 1, "a resumed run must not measure again"
    assert "changed since" not in (config.parent / "runs/parts/console.log").read_text()


def test_evaluation_of_the_export_uses_its_prefix(config, whole):
    run, _ = whole
    student = ("student.architecture=null", f"student.weights={run / 'export'}")
    alone = ("teacher.weights=null", "objective.name=pretrain")
    both, one = (start(config, *student, *words, script="eval_model.py") for words in ((), alone))
    other = start(config, *student, "data.sequence_prefix=none", script="eval_model.py")
    want = records(config, "whole")[-1]
    for processes in (both, one):
        codes, out, errors = end(processes)
        assert codes == [0], errors
        assert "prefix   '<bos>' (id 257), as in the run that made student.weights" in out
        assert json.loads(out.splitlines()[-1])["eval/val_nll"] == pytest.approx(want["eval/val_nll"], rel=1e-5)
    codes, out, (error,) = end(other)
    assert codes == [2]
    assert "data.sequence_prefix = none, but student.weights was trained with '<bos>' (id 257)" in out
    assert "data.sequence_prefix = none is worse than '<bos>' (id 257)\n  teacher's nll " in error


def test_worse_prefix_ends_all_ranks_and_dedicated_teacher_chooses_the_same_prefix(config, whole):
    refused = start(config, "run.name=refused", "parallel.tp=2", "data.sequence_prefix=none", ranks=2)
    apart = start(config, "run.name=apart", "teacher.layout=dedicated", "teacher.ranks=1", ranks=2)
    codes, _, errors = end(refused)
    assert codes == [2, 2], errors
    assert "data.sequence_prefix = none is worse than '<bos>' (id 257)\n  teacher's nll " in errors[0]
    codes, _, errors = end(apart)
    assert codes == [0, 0], errors
    assert prefix_lines(config, "apart") == prefix_lines(config, "whole")
    for one, other in zip(records(config, "apart"), records(config, "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
