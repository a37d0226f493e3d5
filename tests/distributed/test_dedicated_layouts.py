"""Three optimizer steps under DeepSpeed with a dedicated teacher equal those of plain torch."""

import functools
import os
import socket
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.point_to_point import P2PChannel
from kdtrain.jobs import dedicated
from kdtrain.jobs.build.models import engine_settings
from kdtrain.models.attention import common_name
from kdtrain.models.load import ModelSpec, load_backbone
from tests.support.layout_oracle import check_case, oracle
from tests.support.layout_steps import VOCAB, build_backbone, configuration, step_batch, three_steps, whole_teacher

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


@dataclass(frozen=True, slots=True)
class Case:
    """tp, stage: the student's. micro: sequences per micro-batch and data rank, step by step."""

    tp: int
    stage: int
    micro: tuple[int, int, int]
    teacher_tp: int | None = None
    in_flight: int | None = None
    dtype: str = "float32"

    @property
    def name(self):
        micro = ".".join(str(m) for m in self.micro)
        return f"tp{self.tp}-zero{self.stage}-{micro}-teacher{self.teacher_tp}-{self.in_flight}"


CASES = {
    # (students, teachers)
    (2, 1): [Case(2, 1, (8, 1, 3)), Case(1, 2, (4, 1, 3), in_flight=1), Case(1, 3, (1, 4, 2))],
    (2, 2): [Case(1, 1, (1, 4, 3)), Case(2, 3, (1, 3, 8), teacher_tp=2), Case(1, 0, (2, 1, 1), teacher_tp=2)],
}


def settings(folder, case, num_teachers):
    cfg = configuration(case.stage)
    t = cfg.teacher
    t.weights, t.layout, t.ranks, t.dtype = str(folder / "teacher"), "dedicated", num_teachers, "float32"
    t.tp, t.in_flight, cfg.parallel.tp = case.teacher_tp, case.in_flight, case.tp
    return cfg


def save_teacher(folder):
    """The teacher of the oracle as a Hugging Face folder."""
    teacher = whole_teacher(folder)
    teacher.config.save_pretrained(folder / "teacher")
    shapes = teacher.full_shapes()
    tensors = {n: p.detach()[: shapes[n][0]].clone() for n, p in teacher.hf_parameters()}
    save_file(tensors, folder / "teacher" / "model.safetensors", metadata={"format": "pt"})


def train(folder, case, cfg, spec, runtime, mesh):
    """Three steps of a student's rank; (losses and norms of the steps, evaluation after the last)."""
    from kdtrain.engine.zero import StudentEngine

    backbone = build_backbone(folder, "llama", mesh, teacher="plain")
    on_stop = functools.partial(pytest.fail, "no stop signal was sent")
    teacher, head, attention = dedicated.remote_teacher(
        cfg, spec, backbone.shard, mesh, runtime.device, runtime.channel, on_stop=on_stop
    )
    assert common_name(attention) == "sdpa"
    width = head.info.config.hidden_size
    rows = min(backbone.shard.stop, VOCAB) - backbone.shard.start
    assert head.elements_read == rows * width, "more was read than this rank's rows of the head"
    engine = StudentEngine(backbone, mesh, engine_settings(cfg), device=runtime.device)
    answer = three_steps(engine, teacher, case, folder / case.name)
    engine.close()
    return answer


def run_cases(rank, world_size, folder, num_teachers, cases, port):
    """All cases on one rank of the job, in the role of its number."""
    from kdtrain.engine import bootstrap

    dist.destroy_process_group()  # the pool's, which has the ranks of both roles
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    started = bootstrap.start(num_teachers)
    assert started.roles.rank == rank
    assert dist.get_world_size() == started.world_size == (num_teachers if started.roles.is_teacher else 2)
    meshes = {} if started.roles.is_teacher else {tp: Mesh.build(tp) for tp in (1, 2)}
    answers = []
    for number, case in enumerate(cases):
        # one channel per case, so that no key of an earlier case is in the store
        channel = P2PChannel(dist.FileStore(str(folder / f"store{world_size}.{number}"), world_size), rank, world_size)
        runtime, cfg = replace(started, channel=channel), settings(folder, case, num_teachers)
        spec = ModelSpec(weights=cfg.teacher.weights, dtype="float32", attention="sdpa")
        if started.roles.is_teacher:
            answers.append(dedicated.serve(cfg, spec, VOCAB, runtime))
        else:
            with dedicated.student_side(cfg, runtime):
                answers.append(train(folder, case, cfg, spec, runtime, meshes[case.tp]))
        runtime.barrier()
    return answers


@pytest.mark.parametrize(("students", "teachers"), CASES)
def test_every_dedicated_layout_equals_plain_torch(students, teachers, fresh_pool, tmp_path):
    save_teacher(tmp_path)
    want = oracle(tmp_path, "llama", True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cases = CASES[students, teachers]
    answers = fresh_pool(students + teachers).run(
        run_cases, timeout_s=200, folder=tmp_path, num_teachers=teachers, cases=cases, port=port
    )
    assert answers[0] == answers[1], "ranks disagree about a loss or a norm"
    for case, answer in zip(cases, answers[0], strict=True):
        check_case(case, answer, want, tmp_path / case.name)


def test_the_folder_holds_the_teacher_of_the_oracle(tmp_path):
    save_teacher(tmp_path)
    spec = ModelSpec(weights=str(tmp_path / "teacher"), dtype="float32", attention="sdpa")  # as the oracle
    ours = load_backbone(spec, Mesh(), vocab_size=VOCAB, trainable=False)
    batch = step_batch(1)
    with torch.no_grad():
        assert torch.equal(ours.hidden_states(batch), whole_teacher(tmp_path).hidden_states(batch))
