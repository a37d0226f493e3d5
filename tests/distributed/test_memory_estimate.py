"""The memory estimate against what two ranks allocate, stage by stage; and that a smaller bucket changes no number."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.support.layout_steps import Case, configuration, join, make_step, student_of

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BOUND, PART_BOUND = 0.15, 0.03
EXACT = ("weights", "optimizer", "buckets", "masks")
"""Parts that the estimate derives from shapes alone; padding and small tensors make up the difference."""
LAYOUTS = [(1, "bfloat16"), (1, "float32"), (2, "bfloat16"), (2, "float32"), (3, "bfloat16"), (3, "float32")]
OLD_BUCKET = 60_000_000
"""Elements: many times the model, as half a billion is for a small student."""
WITH_OLD_BUCKET = [(1, "float32"), (2, "bfloat16"), (3, "float32")]


def job(stage, dtype, bucket, rank, folder):
    sys.path.insert(0, str(BENCHMARKS))
    from bench_memory import STUDENT, jobs

    student = folder / f"student_{rank}.json"
    student.write_text(json.dumps({**STUDENT, "num_hidden_layers": 4}))
    return {
        **jobs()[0],
        "student": str(student),
        "vocab": 1024,
        "seq_len": 384,
        "micro": 1,
        "sequences": 4,
        "dtype": dtype,
        "zero": stage,
        "bucket": bucket,
    }


def measured(rank, world_size, folder):
    """Per layout what memory_rank.steps measures, with a bucket bounded by the model and with a larger one."""
    found = {}
    for stage, dtype in LAYOUTS:
        for bucket in (None, OLD_BUCKET) if (stage, dtype) in WITH_OLD_BUCKET else (None,):
            here = folder / f"{stage}-{dtype}-{bucket}"
            here.mkdir(exist_ok=True)
            task = job(stage, dtype, bucket, rank, folder)
            from memory_rank import PartBytes, steps

            found[stage, dtype, bucket] = steps(task, here, PartBytes())
    return found


@pytest.mark.slow
def test_the_estimate_is_what_ranks_allocate_and_would_not_be_without_buckets(fresh_pool, tmp_path):
    found = fresh_pool(2).run(measured, folder=tmp_path)[0]
    for (stage, dtype, bucket), answer in found.items():
        layout = f"ZeRO {stage} {dtype}, bucket {bucket}"
        assert answer["peak_bytes"] == pytest.approx(answer["estimate_bytes"], rel=BOUND), layout
        for part in EXACT:
            estimate = answer["parts"][part]
            assert answer["most"][part] == pytest.approx(estimate, rel=PART_BOUND, abs=1 << 14), (layout, part)
        if bucket is not None:
            without = answer["estimate_bytes"] - answer["parts"]["buckets"]
            assert answer["peak_bytes"] > 2 * without, layout
            assert answer["peak_bytes"] > 1.5 * found[stage, dtype, None]["peak_bytes"], layout


def states(rank, world_size, folder):
    """What two steps leave behind, with a bucket bounded by the model and with DeepSpeed's own."""
    from kdtrain.engine import zero_state
    from kdtrain.engine.zero import StudentEngine
    from kdtrain.jobs.build.models import engine_settings

    mesh, found = join(world_size)[1], {}
    for stage, dtype in LAYOUTS:
        case = Case("llama", 1, stage, (1, 1, 1), dtype=dtype)
        for extra in ({}, {"reduce_bucket_size": 500_000_000}):
            cfg = configuration(stage, dtype=dtype)
            cfg.zero.extra = extra
            student = student_of(folder, mesh, case)
            elements = sum(param.numel() for param in student.parameters())
            engine = StudentEngine(student, mesh, engine_settings(cfg), device=torch.device("cpu"))
            assert engine.deepspeed.zero_reduce_bucket_size() == extra.get("reduce_bucket_size", elements)
            steps = [make_step(engine, step, 1) for step in (1, 2)]
            state = {f.as_slice().key: f.tensor.clone() for f in zero_state.local_fragments(engine)}
            found[stage, dtype, bool(extra)] = steps, state
            engine.close()
    return found


@pytest.mark.slow
def test_a_bucket_bounded_by_the_model_changes_no_bit(fresh_pool, tmp_path):
    for found in fresh_pool(2).run(states, folder=tmp_path):
        for stage, dtype in LAYOUTS:
            (steps, state), (old_steps, old_state) = found[stage, dtype, False], found[stage, dtype, True]
            assert steps == old_steps, (stage, dtype)
            assert state.keys() == old_state.keys()
            assert all(torch.equal(state[key], old_state[key]) for key in state), (stage, dtype)
