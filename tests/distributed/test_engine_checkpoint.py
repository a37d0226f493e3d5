"""Checkpoints of engines: a resumed run is bitwise equal, in another layout equal up to rounding."""

import hashlib
import json
import resource

import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.errors import CheckpointError
from kdtrain.models.tiny import tiny_config
from tests.support.checkpoint_engines import build, join, name_of, one_step

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

STEPS, SAVE_AT = 3, 2

# (zero stage, dtype, architecture, vocabulary): 299 rows leave padding on one tp rank, with 101 it has nothing else
CASES = [
    (0, "float32", "smollm", 299),
    (1, "float32", "tied", 101),
    (2, "float32", "smollm", 299),
    (3, "float32", "smollm", 299),
    (1, "bfloat16", "smollm", 299),
    (2, "bfloat16", "tied", 299),
    (3, "bfloat16", "tied", 101),
]


@pytest.fixture
def architectures(tmp_path):
    configs = {
        "smollm": tiny_config("smollm"),
        "tied": tiny_config("qwen3", tie_word_embeddings=True),
        "wider": tiny_config("smollm", intermediate_size=52),
        "slower": tiny_config("smollm", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    }
    for name, config in configs.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    return tmp_path


def fingerprints(engine):
    """sha256 of every tensor that the next step depends on: master weights, moments, step counts, working weights."""
    import deepspeed

    from kdtrain.engine import zero_state

    found = {f.as_slice().key: f.tensor for f in zero_state.local_fragments(engine)}
    for name, param in engine.backbone.hf_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=engine.zero_stage == 3):
            found[f"{name} working"] = param.detach().float().clone()
    hashes = {key: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for key, value in found.items()}
    return hashes | zero_state.local_adam_steps(engine)


def run_through(rank, world_size, folder, cases):
    """Every case uninterrupted, with a save: the engine's state at the save and at the end, and the losses."""
    join()
    mesh = Mesh.build(2)
    answers = []
    for case in cases:
        engine = build(folder, mesh, *case)
        losses = [one_step(engine, step) for step in range(1, SAVE_AT + 1)]
        checkpoint.save(folder / name_of(case), engine, step=SAVE_AT, state={"case": list(case)})
        saved = fingerprints(engine)
        losses += [one_step(engine, step) for step in range(SAVE_AT + 1, STEPS + 1)]
        answers.append((saved, losses, fingerprints(engine)))
        engine.close()
    return answers


def resume(rank, world_size, folder, cases):
    """Every case from its checkpoint, in an engine that has other weights and has made a step."""
    join()
    mesh = Mesh.build(2)
    answers = []
    for index, case in enumerate(cases):
        engine = build(folder, mesh, *case, seed=2)
        if index % 2:
            one_step(engine, 77)
        state = checkpoint.load(checkpoint.find_latest(folder / name_of(case)), engine)
        assert state == {"case": list(case)}
        loaded = fingerprints(engine)
        losses = [one_step(engine, step) for step in range(SAVE_AT + 1, STEPS + 1)]
        answers.append((loaded, losses, fingerprints(engine)))
        engine.close()
    return answers


def test_resumed_run_equals_uninterrupted_run_bitwise(fresh_pool, architectures):
    whole = fresh_pool(4).run(run_through, folder=architectures, cases=CASES)
    resumed = fresh_pool(4).run(resume, folder=architectures, cases=CASES)
    for rank in range(4):
        for case, (saved, losses, end), (loaded, more_losses, new_end) in zip(
            CASES, whole[rank], resumed[rank], strict=True
        ):
            changed = [key for key in saved if saved[key] != loaded.get(key)]
            assert not changed, f"{case}, rank {rank}, right after loading: {changed[:5]}"
            assert more_losses == losses[SAVE_AT:], f"{case}, rank {rank}: loss or gradient norm"
            changed = [key for key in end if end[key] != new_end.get(key)]
            assert not changed, f"{case}, rank {rank}, at the end: {changed[:5]}"
            assert saved.keys() == loaded.keys()
            assert any(saved[key] != end[key] for key in saved), "nothing was trained"


def relay(rank, world_size, folder, legs, root, nudged=False):
    """Train two steps in each layout (tp, stage) of `legs`, continued by checkpoint; the last checkpoint.

    nudged: as in `build`, of the first leg.
    """
    join()
    last = None
    for number, (tp, stage) in enumerate(legs):
        mesh = Mesh.build(tp)
        engine = build(folder, mesh, stage, "float32", "smollm", 299, seed=number + 1, nudged=nudged and not number)
        if number:
            assert checkpoint.load(checkpoint.find_latest(folder / root), engine) == {"leg": number - 1}
        for step in (2 * number + 1, 2 * number + 2):
            one_step(engine, step)
        last = checkpoint.save(folder / root, engine, step=2 * number + 2, state={"leg": number})
        checkpoint.retain(folder / root, 2, just_saved=last, mesh=mesh)
        engine.close()
    return last


def test_a_run_continues_in_any_other_layout(fresh_pool, architectures):
    from kdtrain.engine.slices import CheckpointReader

    pool = fresh_pool(2)
    moved = pool.run(relay, folder=architectures, legs=[(2, 2), (1, 1), (1, 3), (2, 0), (2, 3)], root="moved")[0]
    alone = fresh_pool(1)
    stayed = alone.run(relay, folder=architectures, legs=[(1, 1)] * 5, root="stayed")[0]
    # the effect of rounding after ten steps, which differs between processors
    nudged = alone.run(relay, folder=architectures, legs=[(1, 1)] * 5, root="nudged", nudged=True)[0]
    assert moved.name == stayed.name == "step_000010"
    with (
        CheckpointReader(moved) as got,
        CheckpointReader(stayed) as want,
        CheckpointReader(nudged) as rounded,
        CheckpointReader(stayed.with_name("step_000008")) as before,
    ):
        assert got.manifest.layout == {"tp": 2, "dp": 1, "cp": 1, "zero_stage": 3, "dtype": "float32"}
        assert got.manifest.parameters["model.layers.0.self_attn.o_proj.weight"].cut.dim == 1
        assert got.manifest.fingerprint == want.manifest.fingerprint
        assert sorted(got.names()) == sorted(want.names())
        for name in want.names():
            assert got.manifest.parameters[name].adam_step == 10
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                value = want.read_full(name, kind)
                noise = (rounded.read_full(name, kind) - value).abs().max()
                assert noise < 1e-4, (name, kind)
                assert (got.read_full(name, kind) - value).abs().max() < 1e-6 + 3 * noise, (name, kind)
            moved_by = (want.read_full(name, "master") - before.read_full(name, "master")).abs().max()
            assert moved_by > 1e-3, f"{name} hardly moved, so that equality would prove little"


def refusals(rank, world_size, folder):
    """Loads that must fail on both ranks, and a save that only rank 1 cannot finish; the messages."""
    join()
    mesh = Mesh.build(2)
    root = folder / "good"
    engine = build(folder, mesh, 1, "float32", "smollm", 299)
    good = checkpoint.save(root, engine, step=1, state={})
    found = {}
    for what, case in {"width": ("wider", 299), "rows": ("smollm", 300), "config": ("slower", 299)}.items():
        other = build(folder, mesh, 1, "float32", *case)
        with pytest.raises(CheckpointError) as refused:
            checkpoint.load(good, other)
        found[what] = str(refused.value)
        other.close()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as failed:
        checkpoint.save(root, engine, step=2, state={})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found["full disk"] = str(failed.value)
    found["left"] = sorted(path.name for path in root.iterdir())
    torch.distributed.barrier()
    if rank == 0:
        damaged = good / "rank_00001.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-3] ^= 1
        damaged.write_bytes(content)
    torch.distributed.barrier()
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(good, engine)
    found["bit"] = str(refused.value)
    engine.close()
    return found


def test_failure_on_one_rank_raises_on_all_with_cause(fresh_pool, architectures):
    for found in fresh_pool(2).run(refusals, folder=architectures):
        assert "model.layers.0.mlp.gate_proj.weight: (44, 36) there, (52, 36) here" in found["width"]
        assert "lm_head.weight: (299, 36) there, (300, 36) here" in found["rows"]
        assert "rope_theta" in found["config"]
        assert "10000.0" in found["config"]
        assert "500.0" in found["config"]
        assert "step_000002 was not saved: rank 1: " in found["full disk"]
        assert "[Errno 27]" in found["full disk"]
        assert found["left"] == ["step_000001"]
        assert "rank 1: " in found["bit"]
        assert "rank_00001.safetensors: has sha256" in found["bit"]
