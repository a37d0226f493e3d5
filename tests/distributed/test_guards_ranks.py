"""Rank-local failures reach all ranks of a run: a step that is not finite, a full disk, a rank that hangs."""

import math
import time

import pytest

from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import NonFiniteLoss, OutputError
from tests.support.tiny_trainer import adam_steps, full_disk, records_of, tiny_trainer

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


def one_rank_has_a_nonfinite_step(rank, world_size, folder):
    """Sample 13 is of step 2 and of data rank 1 (ids 8 to 11 are rank 0's there)."""
    mesh = Mesh.build(1)
    run = tiny_trainer(folder, 6, {13: math.inf}, mesh=mesh, max_skipped_steps=1, every=None)
    run.run()
    assert (run.progress.skipped_steps, adam_steps(run)) == (1, 5)
    (folder / "stops").mkdir(exist_ok=True)
    stops = tiny_trainer(folder / "stops", 6, {13: math.inf}, mesh=mesh)
    with pytest.raises(NonFiniteLoss) as caught:
        stops.run()
    return run.engine.weight.item(), stops.progress.step, str(caught.value).splitlines()[1]


def the_disk_of_rank_0_is_full(rank, world_size, folder):
    run = tiny_trainer(folder, 50, mesh=Mesh.build(1), log=50, every=None)
    with full_disk(100 if rank == 0 else 1 << 30), pytest.raises(OutputError) as caught:
        run.run()  # if only rank 0 stopped, the other would wait until the time-out
    return run.progress.step, str(caught.value).splitlines()[0]


def rank_1_sleeps(rank, world_size, folder):
    from kdtrain.log import LOGGER
    from kdtrain.run_state.heartbeat import Watchdog

    run = tiny_trainer(folder, 3, mesh=Mesh.build(1))
    warned, draw = [], type(run.batches).__next__

    class SlowLoader(type(run.batches)):
        def __next__(self):
            if rank == 1 and run.progress.step == 2:
                time.sleep(3.5)
            return draw(self)

    run.batches.__class__ = SlowLoader
    with pytest.MonkeyPatch.context() as patch, Watchdog(run.timer.tracker, folder, world_size, warn_s=1.5):
        patch.setattr(LOGGER, "warning", lambda text, *args: warned.append(text % args))
        run.run()
    return [line for line in warned if line.startswith("stall")]


def test_rank_local_failures_reach_all_ranks(fresh_pool, tmp_path):
    pool = fresh_pool(2)
    folders = [tmp_path / name for name in ("finite", "disk", "stall")]
    for folder in folders:
        folder.mkdir()
    answers = pool.run(one_rank_has_a_nonfinite_step, folder=folders[0])
    assert answers[0][0] == answers[1][0]
    assert [answer[1] for answer in answers] == [2, 2]
    assert [answer[2].partition(" (")[0] for answer in answers] == [
        "  samples of data rank 0: [8, 9, 10, 11]",
        "  samples of data rank 1: [12, 13, 14, 15]",
    ]
    both = [[8, 9, 10, 11], [12, 13, 14, 15]]
    for folder in (folders[0], folders[0] / "stops"):
        assert records_of(folder / "skipped.jsonl") == [{"data/step": 2, "grad_norm": "nan", "sample_ids": both}]

    full = pool.run(the_disk_of_rank_0_is_full, folder=folders[1], timeout_s=60)
    assert [step for step, _ in full] == [1, 1], "the step after the report that failed must not be taken"
    assert full[0][1] == f"cannot write {folders[1] / 'metrics.jsonl'}: [Errno 27] File too large"
    assert full[1][1] == "another rank cannot write its files; its message names the file"

    stalls = pool.run(rank_1_sleeps, folder=folders[2], timeout_s=60)
    assert stalls[0], "rank 0 waited for 3.5 s without a warning"
    assert stalls[0][0].startswith("stall    rank 0: step 3 has taken ")
    assert "; behind: rank 1 on " in stalls[0][0]
    assert "(completed optimizer of step 2 " in stalls[0][0]
    assert stalls[0][0].endswith("now in data_wait)")
    assert stalls[1][0].startswith("stall    rank 1: step 3 has taken ")
