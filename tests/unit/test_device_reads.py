"""Which forward passes leave the device alone: the host queues them without waiting for a value of a tensor.

The device is torch's `meta`, whose tensors have no values: whatever reads one raises. Groups of several ranks are
torch's `fake` ones, which complete every collective at once.
"""

import json
import traceback
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdtrain.batch import Batch
from kdtrain.config.schema import DistillObjective, GuardSection, PretrainObjective
from kdtrain.data.context import cut_sequences
from kdtrain.distributed import collectives
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.documents import Documents
from kdtrain.engine.zero import StepResult
from kdtrain.evaluation.validation import Validation
from kdtrain.models import context
from kdtrain.models.backbone import call_with_head
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.objectives.distill import Distill
from kdtrain.objectives.pretrain import Pretrain
from kdtrain.teacher.online import OnlineTeacher, Passes
from kdtrain.teacher.resharding import TeacherResharding
from kdtrain.teacher.side_stream import SideStream
from kdtrain.teacher.signal import HeadLayout
from kdtrain.telemetry.metrics import Metrics
from kdtrain.training.guards import Guards, nan_if_nonfinite
from tests.support.tiny_trainer import tiny_trainer

aten = torch.ops.aten
META = torch.device("meta")
VOCAB, SEQ_LEN = 299, 8


def batches(count=3, rows=3):
    """On the host; every sequence but the first holds two documents."""
    found = []
    for number in range(count):
        positions = torch.arange(SEQ_LEN).repeat(rows, 1)
        positions[1:, 3 + number % 3 :] -= 3 + number % 3
        ids = torch.arange(rows * SEQ_LEN).view(rows, SEQ_LEN) + number
        keys = torch.arange(rows) + 10 * number
        found.append(Batch(ids, ids + 1, torch.ones(ids.shape), positions, keys, Documents.of(positions)))
    return found


def moved(count=3, rows=3):
    return [batch.to(META) for batch in batches(count, rows)]


def backbone_of(
    folder, family="qwen3", *, attention="packed", device=META, mesh=None, trainable=False, rows=None, **changes
):
    path = folder / f"{family}.json"
    path.write_text(json.dumps(tiny_config(family, **changes)))
    spec = ModelSpec(architecture=str(path), dtype="float32", attention=attention)
    mesh = mesh or Mesh()
    return load_backbone(spec, mesh, vocab_size=VOCAB, total_rows=rows, trainable=trainable).to(device)


def test_copies_that_the_host_waits_for_are_detected():
    for copy in (lambda x: x.to(META), lambda x: torch.empty(3, device=META).copy_(x)):
        with NoWaiting(), pytest.raises(AssertionError, match="waits for"):
            copy(torch.ones(3))
    with NoWaiting():
        torch.ones(3).to(META, non_blocking=True)
        torch.empty(3, device=META).copy_(torch.ones(3), non_blocking=True)
        torch.ones(3, device=META).to(META)


class NoWaiting(TorchDispatchMode):
    """Refuses copies to the device that the host waits for: on CUDA they wait for all that is queued there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._to_copy.default:
            waits = args[0].is_cpu and not kwargs.get("non_blocking", False) and kwargs.get("device") == META
        elif func is aten.copy_.default:
            waits = args[1].is_cpu and not (args[2:] or (kwargs.get("non_blocking", False),))[0] and args[0].is_meta
        else:
            waits = False
        assert not waits, "a copy to the device that the host waits for"
        return func(*args, **kwargs)


@pytest.fixture
def ranks():
    """ranks(n): the first of n ranks, all of whose collectives are complete at once and move nothing."""

    def start(world_size):
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def no_autocast(monkeypatch):
    """Losses switch autocast off, which torch cannot do for this device."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **settings: nullcontext())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_a_forward_pass_with_documents_that_are_known_reads_nothing(tmp_path, family):
    backbone, batch = backbone_of(tmp_path, family), moved(1)[0]
    with NoWaiting():
        assert backbone.hidden_states(batch).shape[0] == batch.num_tokens
    with pytest.raises(RuntimeError, match="meta"):
        backbone.hidden_states(Batch(*batch.tensors()))


def test_documents_that_are_known_are_those_that_are_used(tmp_path):
    backbone, (batch,) = backbone_of(tmp_path, device="cpu"), batches(1)
    want = backbone.hidden_states(Batch(*batch.tensors()))
    assert torch.equal(backbone.hidden_states(batch), want)
    joined = Documents.of(torch.arange(SEQ_LEN).repeat(3, 1))
    other = Batch(*batch.tensors(), joined)
    assert (backbone.hidden_states(other) - want).abs().max() > 1e-3, "position_ids were read all the same"
    with pytest.raises(ValueError, match=r"documents of sequences \(2, 8\) in a batch of \(3, 8\)"):
        backbone.hidden_states(Batch(*batch.tensors(), joined.sequences(0, 2)))


def student_step(student, batch, teacher=None):
    """Forward and backward of one micro-batch, and what a trainer keeps of them."""
    layout = HeadLayout(student.shard, None, 1 << 20, "torch")

    def run(batch, head_fn):
        return call_with_head(student, batch, head_fn)

    settings = DistillObjective(divergence="skew_kl", temperature=2.0, kd_weight=0.7, skew=0.3)
    objective = (
        Pretrain(run, None, PretrainObjective(), layout)
        if teacher is None
        else Distill(run, teacher, settings, layout, z_loss=1e-3)
    )
    out = objective(batch, measure=teacher is not None)
    nan_if_nonfinite(out.loss_sum).backward()
    return out


TEACHERS = {
    "one by one": {},
    "few tokens": {"max_tokens": SEQ_LEN},
    "together": {"together": True},
    "together, few tokens": {"together": True, "max_tokens": 2 * SEQ_LEN},
    "ahead": {"side": True},
    "ahead, few tokens": {"side": True, "max_tokens": SEQ_LEN},
}


def teacher_of(backbone, mesh, shard, teacher_mesh, how):
    settings = dict(TEACHERS[how])
    if settings.pop("side", False):
        settings["side"] = SideStream(META)
    return OnlineTeacher(backbone, mesh, shard, teacher_mesh, passes=Passes(**settings))


@pytest.mark.parametrize("how", TEACHERS)
def test_a_step_of_distillation_reads_nothing_between_its_first_and_last_micro_batch(tmp_path, how, no_autocast):
    student = backbone_of(tmp_path, "llama", trainable=True)
    teacher = teacher_of(backbone_of(tmp_path), Mesh(), student.shard, Mesh(), how)
    step = moved()
    with NoWaiting():
        teacher.prefetch(step)
        for batch in step:
            assert student_step(student, batch, teacher).loss_sum.device == META
        assert all(param.grad is not None for _, param in student.hf_parameters())
        student_step(student, moved(1, rows=2)[0])  # plain cross-entropy


@pytest.mark.parametrize("how", TEACHERS)
def test_ranks_that_share_out_sequences_read_nothing(tmp_path, ranks, how):
    ranks(2)
    backbone = backbone_of(tmp_path, rows=512)
    mesh = Mesh(world_size=2, tp_size=2, tp_group=dist.group.WORLD)
    teacher = teacher_of(backbone, mesh, VocabShard.of(VOCAB, 0, 2, total_rows=512), Mesh(), how)
    step = moved()
    with NoWaiting():
        teacher.prefetch(step)
        for batch in [*step, *moved(1, rows=1)]:
            assert teacher.signal(batch).hidden_states.shape[0] == batch.num_tokens


@pytest.mark.parametrize("how", ["one by one", "few tokens", "together", "ahead"])
def test_replicas_that_share_a_teacher_read_at_the_beginning_of_a_step_alone(tmp_path, ranks, how, monkeypatch):
    ranks(2)
    student_mesh, teacher_mesh = Mesh.build(1), Mesh.build(2)
    backbone = backbone_of(tmp_path, mesh=teacher_mesh)
    shard = VocabShard.of(VOCAB, total_rows=2 * backbone.shard.rows)
    teacher = teacher_of(backbone, student_mesh, shard, teacher_mesh, how)
    step = moved()
    with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
        teacher.prefetch(step)

    def gathered(self, batches):  # as if every replica had the documents of this one
        return [Documents.cat([batch.documents] * self.num_replicas) for batch in batches]

    with monkeypatch.context() as patch:
        patch.setattr(TeacherResharding, "gather_documents", gathered)
        teacher.prefetch(step)
    with NoWaiting():
        for batch in step:
            assert teacher.signal(batch).hidden_states.shape[0] == 2 * batch.num_tokens


@pytest.mark.parametrize("attention", ["packed", "flash_attention_2"])
def test_ranks_that_share_sequences_neither_read_nor_gather_positions(tmp_path, ranks, attention, monkeypatch):
    ranks(2)
    boundaries, gathers = [], []

    def flash(module, query, key, value, mask, *, cu_seq_lens_q, max_length_q, **settings):
        boundaries.append((cu_seq_lens_q.shape, max_length_q, mask, settings["position_ids"]))
        return query.transpose(1, 2), None

    def counted(values, group, gather=collectives.gather_ranks):
        gathers.append(values.shape)
        return gather(values, group)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    monkeypatch.setattr(context, "gather_ranks", counted)
    mesh = Mesh(world_size=2, cp_size=2, cp_group=dist.group.WORLD)
    backbone = backbone_of(tmp_path, "llama", mesh=mesh, num_attention_heads=4)
    backbone.config._attn_implementation = f"ulysses_{attention}"
    (whole,) = batches(1)
    part = cut_sequences(whole, 0, 2).to(META)
    with NoWaiting():
        assert backbone.hidden_states(part).shape[0] == part.num_tokens
    assert gathers == []
    wanted = (whole.documents.offsets.shape, SEQ_LEN, None, None)
    assert boundaries == ([wanted] * 2 if attention.startswith("flash") else [])
    with pytest.raises(RuntimeError, match="meta"):
        backbone.hidden_states(Batch(*part.tensors()))
    assert gathers == [part.position_ids.shape]


def test_a_validation_reads_its_sums_alone(tmp_path, no_autocast):
    student = backbone_of(tmp_path, "llama")
    teacher = OnlineTeacher(backbone_of(tmp_path), Mesh(), student.shard, Mesh())
    layout = HeadLayout(student.shard, None, 1 << 20, "torch")
    validation = Validation(lambda batch, head_fn: call_with_head(student, batch, head_fn), teacher, layout, Mesh())
    with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor") as caught:
        validation.run(batches(), META)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [frame.name for frame in frames][-2:] == ["reduce", "_reduced"], "not the sums at the end"


class Engine:
    """Adds gradients up like the real one; its norm is not read."""

    def __init__(self, student):
        self.student = student

    def backward(self, loss_sum, num_valid_tokens):
        (loss_sum / num_valid_tokens).backward()

    def step(self, lr):
        return StepResult(1.0, True)


class Steps:
    """A source of given steps; no checkpoint is made of it."""

    def __init__(self, steps):
        self._steps = iter(steps)

    def __next__(self):
        return next(self._steps)

    def state_dict(self):
        return {}


def test_a_trainer_reads_no_value_of_a_micro_batch(tmp_path, no_autocast):
    """Not for the global number of tokens, and not to keep losses and metrics for the next report."""
    student = backbone_of(tmp_path, "llama", trainable=True)
    trainer = tiny_trainer(tmp_path, 3)
    trainer.device = META
    trainer.engine = Engine(student)
    trainer.guards = Guards(GuardSection(), Mesh(), META, trainer.progress)
    layout = HeadLayout(student.shard, None, 1 << 20, "torch")
    trainer.objective = Pretrain(
        lambda batch, head_fn: call_with_head(student, batch, head_fn), None, PretrainObjective(), layout
    )
    trainer.batches = Steps([batches(2), batches(2, rows=1)])
    for rows in (3, 1):
        metrics = Metrics(META)
        with NoWaiting():
            step = trainer._next_micro_batches()
            assert {batch.input_ids.device for batch in step} == {META}
            assert trainer.sync_step_state(step) == (2.0 * rows * SEQ_LEN, False)
            assert trainer._optimizer_step(step, 2.0 * rows * SEQ_LEN, metrics, True, False)[0].applied
        with pytest.raises(RuntimeError, match="meta"):
            metrics.reduce()
    with pytest.raises(RuntimeError, match="meta"):
        trainer.guards.check_losses()


class Reads(TorchDispatchMode):
    """Where values of tensors are read by the host: the innermost Python functions, with their files."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2"):
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.found.add((frames[-1].filename.rsplit("/", 1)[-1], frames[-1].name))
        return func(*args, **(kwargs or {}))


def test_the_reads_that_are_left_are_those_of_masks_and_of_dynamic_rotary_embeddings(tmp_path, monkeypatch):
    """In transformers, and in `DocumentRotary` of the type dynamic, which asks for the lengths that occur."""

    def flash(module, query, key, value, mask, **settings):
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    mask = {("masking_utils.py", "find_packed_sequence_indices")}
    (batch,) = batches(1)

    def reads(attention, family="llama", name=None, **changes):
        backbone = backbone_of(tmp_path, family, attention=attention, device="cpu", **changes)
        backbone.config._attn_implementation_internal = name or attention
        with Reads() as found:
            backbone.hidden_states(batch)
        return found.found

    host = reads("packed")  # of tensors that are on the host on any device: it runs on `meta`
    assert reads("sdpa") == reads("eager") == reads("sdpa", name="flash_attention_2") == mask
    assert reads("sdpa", name="ulysses_sdpa") == mask, "its boundaries were read as well"
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}
    dynamic = reads("packed", max_position_embeddings=4, rope_parameters=rope)
    assert dynamic > host
    assert dynamic - host <= {("rotary.py", "_tables"), ("modeling_rope_utils.py", "dynamic_frequency_update")}
    long = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.1], "long_factor": [2.0, 5.0]}
    assert reads("packed", "phi3", original_max_position_embeddings=4, rope_parameters=long) == host
