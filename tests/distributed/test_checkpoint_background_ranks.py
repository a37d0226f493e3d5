"""Checkpoints written in the background by several ranks: bytes of the synchronous write, errors on all ranks."""

import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.engine.background import BackgroundWriter
from kdtrain.errors import CheckpointError, NonFiniteLoss
from kdtrain.models.tiny import tiny_config
from tests.support.checkpoint_engines import build, join, name_of, one_step
from tests.support.tiny_trainer import tiny_trainer

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

HERE = Path(__file__).parent
CASES = [(1, "float32", "smollm", 299), (3, "bfloat16", "smollm", 299)]


def train_until_written(engine, writer, at):
    """Steps as the trainer takes them: advance when no rank is busy. Steps taken."""
    steps = 0
    while writer.in_flight is not None:
        one_step(engine, at + steps)
        steps += 1
        busy = torch.tensor(float(writer.busy))
        dist.all_reduce(busy)
        if not busy:
            writer.advance()
    return steps


def write_both_ways(rank, world_size, folder, cases):
    """Every case: bytes of the same state by the synchronous write and by save_async during steps that change it."""
    join()
    mesh, answers = Mesh.build(2), []
    for case in cases:
        engine, writer = build(folder, mesh, *case), BackgroundWriter(mesh, torch.device("cpu"))
        one_step(engine, 1)
        plain = checkpoint.save(folder / "plain" / name_of(case), engine, step=1, state={"a": 1})
        root = folder / "behind" / name_of(case)
        checkpoint.save_async(writer, root, engine, step=1, state={"a": 1}, prune=lambda saved: None)
        steps = train_until_written(engine, writer, 2)
        dist.barrier()
        answers.append((steps, *({p.name: p.read_bytes() for p in f.iterdir()} for f in (plain, root / plain.name))))
        engine.close()
    return answers


def rank_1_has_no_room(rank, world_size, folder):
    join()
    mesh, root = Mesh.build(2), folder / "full"
    engine, writer = build(folder, mesh, *CASES[0]), BackgroundWriter(mesh, torch.device("cpu"))
    good = checkpoint.save(root, engine, step=1, state={})
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    checkpoint.save_async(writer, root, engine, step=2, state={}, prune=lambda saved: None)
    with pytest.raises(CheckpointError) as failed:
        train_until_written(engine, writer, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left, latest = sorted(path.name for path in root.iterdir()), checkpoint.find_latest(root)
    engine.close()
    return str(failed.value), left, latest == good


@pytest.fixture
def smollm(tmp_path):
    (tmp_path / "smollm").mkdir()
    (tmp_path / "smollm/config.json").write_text(json.dumps(tiny_config("smollm")))


@pytest.mark.slow
@pytest.mark.usefixtures("smollm")
def test_async_save_equals_synchronous_write(fresh_pool, tmp_path):
    for answers in fresh_pool(2).run(write_both_ways, folder=tmp_path, cases=CASES):
        for case, (steps, plain, behind) in zip(CASES, answers, strict=True):
            assert steps >= 3, f"{case}: one agreement per stage"
            assert sorted(plain) == ["checkpoint.json", "rank_00000.safetensors", "rank_00001.safetensors"]
            assert plain == behind, case


@pytest.mark.usefixtures("smollm")
def test_full_disk_of_one_rank_raises_on_all_ranks_during_async_save(fresh_pool, tmp_path):
    found = fresh_pool(2).run(rank_1_has_no_room, folder=tmp_path)
    for message, left, former in found:
        assert message == found[0][0]
        assert "step_000002 was not saved: rank 1: " in message
        assert "[Errno 27]" in message
        assert left == ["step_000001"]
        assert former


class Slow:
    """Checkpoints whose writer is busy on this rank until its `ready`-th step; records the steps of `advance`."""

    def __init__(self, progress, ready):
        self.progress, self.ready, self.advanced, self.waited = progress, ready, [], []

    @property
    def busy(self):
        return self.progress.step < self.ready

    def advance(self):
        self.advanced.append(self.progress.step)

    def wait(self):
        self.waited.append(self.progress.step)

    def save(self, engine, progress, data_state, *, wait=True):
        self.waited += [progress.step] * wait


def train_with_slow_writers(rank, world_size, folder):
    run = tiny_trainer(folder, 6, mesh=Mesh.build(1), every=2)
    run.checkpoints = Slow(run.progress, ready=2 + 2 * rank)
    run.run()
    found = run.checkpoints.advanced, run.checkpoints.waited
    stops = tiny_trainer(folder / "nan", 6, {13: float("inf")}, mesh=Mesh.build(1))
    stops.checkpoints = Slow(stops.progress, ready=9)
    with pytest.raises(NonFiniteLoss):
        stops.run()
    return *found, stops.checkpoints.waited


def test_trainer_advances_async_save_when_no_rank_is_busy_and_waits_at_end(fresh_pool, tmp_path):
    (tmp_path / "nan").mkdir()
    for advanced, waited, before_the_error in fresh_pool(2).run(train_with_slow_writers, folder=tmp_path):
        assert advanced == [4, 5, 6], "rank 1 was busy until step 4, rank 0 only until 2"
        assert waited == [6], "only the last save is waited for"
        assert before_the_error == [2], "a run that ends by nan completes what it was writing"
