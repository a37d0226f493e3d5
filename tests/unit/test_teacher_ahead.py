"""Overlap and token limits of an online teacher change when it runs, but not its hidden states."""

import json

import pytest
import torch

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.documents import Documents
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.teacher.online import OnlineTeacher, Passes
from kdtrain.teacher.side_stream import SideStream
from tests.support.validation_reference import uneven_batches

CPU = torch.device("cpu")
VOCAB, SEQ_LEN = 299, 8


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "config.json"
    path.write_text(json.dumps(tiny_config("qwen3")))
    spec = ModelSpec(architecture=str(path), dtype="float32", attention="sdpa")
    return load_backbone(spec, Mesh(), vocab_size=VOCAB, trainable=False)


def batches(count, sequences=3):
    return uneven_batches(VOCAB, [(sequences, SEQ_LEN)] * count, seq_len=SEQ_LEN)


def teacher_of(backbone, log, **settings):
    def forward(batch):
        log.append(("teacher", int(batch.sample_ids[0]), batch.num_tokens))
        return backbone.hidden_states(batch)

    return OnlineTeacher(backbone, Mesh(), backbone.shard, Mesh(), forward=forward, passes=Passes(**settings))


def learn(teacher, micro_batches, log):
    """The trainer's calls of a step; returns the hidden states of each micro-batch."""
    found = []
    teacher.prefetch(micro_batches)
    for batch in micro_batches:
        found.append(teacher.signal(batch).hidden_states)
        log.append(("student", int(batch.sample_ids[0])))
    return found


def numbered(micro_batches):
    return [
        type(b)(b.input_ids, b.labels, b.loss_mask, b.position_ids, b.sample_ids * 0 + i)
        for i, b in enumerate(micro_batches)
    ]


def test_with_overlap_the_next_micro_batch_starts_before_the_student_trains_on_the_present_one(backbone):
    steps = [numbered(batches(4)) for _ in range(2)]
    log, plain_log = [], []
    ahead = teacher_of(backbone, log, side=SideStream(CPU))
    plain = teacher_of(backbone, plain_log)
    for step in steps:
        for got, want in zip(learn(ahead, step, log), learn(plain, step, plain_log), strict=True):
            assert torch.equal(got, want)
    order = [entry[:2] for entry in log]
    once = [("teacher", 0)]
    for i in range(4):
        once += [("teacher", i + 1)] * (i < 3) + [("student", i)]
    assert order == once * 2
    assert [entry[:2] for entry in plain_log] == [(who, i) for i in range(4) for who in ("teacher", "student")] * 2


def test_overlap_is_independent_of_validation_and_of_an_abandoned_step(backbone):
    log = []
    teacher = teacher_of(backbone, log, side=SideStream(CPU))
    step, other = numbered(batches(3)), batches(1, sequences=2)[0]
    alone = backbone.hidden_states(other)
    assert torch.equal(teacher.signal(other).hidden_states, alone)
    teacher.prefetch(step)
    assert torch.equal(teacher.signal(other).hidden_states, alone)
    assert torch.equal(teacher.signal(step[0]).hidden_states, backbone.hidden_states(step[0]))
    log.clear()
    learn(teacher, step, log)  # the earlier step was abandoned after its first micro-batch
    assert [entry[1] for entry in log if entry[0] == "teacher"] == [0, 1, 2]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("limit", "passes"), [(None, [24]), (24, [24]), (23, [16, 8]), (16, [16, 8]), (8, [8] * 3), (1, [8] * 3)]
)
def test_a_limit_on_tokens_splits_passes_by_sequences_and_changes_nothing(backbone, limit, passes, together):
    log, step = [], batches(2)
    teacher = teacher_of(backbone, log, max_tokens=limit, together=together)
    found = learn(teacher, step, log)
    sizes = [entry[2] for entry in log if entry[0] == "teacher"]
    if together:
        at_once = 6 if limit is None else max(1, limit // SEQ_LEN)
        assert sizes == [min(at_once, 6 - start) * SEQ_LEN for start in range(0, 6, at_once)]
    else:
        assert sizes == passes * 2
    for got, batch in zip(found, step, strict=True):
        want = backbone.hidden_states(batch)
        assert got.shape == want.shape
        assert float((got - want).norm() / want.norm()) < 1e-6


def test_a_side_stream_on_the_cpu_runs_work_at_once():
    value = torch.arange(4.0)
    take = SideStream(CPU).start(lambda: value * 2, [value])
    value.zero_()
    assert take().tolist() == [0, 2, 4, 6], "on the CPU the work runs in start()"


def test_a_side_stream_records_all_tensors_that_its_work_reads(backbone):
    """The allocator could reuse the memory of other tensors while the work reads them."""
    recorded = []

    class Side:
        def start(self, work, inputs):
            recorded.extend(inputs)
            result = work()
            return lambda: result

    batch = batches(1)[0]
    batch = Batch(*batch.tensors(), Documents.of(batch.position_ids))
    teacher = OnlineTeacher(backbone, Mesh(), backbone.shard, Mesh(), passes=Passes(side=Side()))
    teacher.prefetch([batch])
    needed = [batch.input_ids, batch.position_ids, batch.documents.offsets]
    assert all(any(values is other for other in recorded) for values in needed)
    assert torch.equal(teacher.signal(batch).hidden_states, backbone.hidden_states(batch))


def test_a_batch_with_the_id_of_an_earlier_one_gets_its_own_result(backbone):
    """Python reuses the id() of a deleted batch."""
    teacher = OnlineTeacher(backbone, Mesh(), backbone.shard, Mesh(), passes=Passes(together=True))
    for _ in range(20):
        teacher.prefetch(batches(2))  # never taken
        later = batches(1, sequences=2)[0]
        assert teacher.signal(later).hidden_states.shape[0] == later.num_tokens
