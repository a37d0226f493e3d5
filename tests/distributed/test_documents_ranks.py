"""Documents that travel with a batch, on several ranks: the hidden states of documents read from position_ids."""

import json

import pytest
import torch

from kdtrain.batch import Batch
from kdtrain.data.context import cut_sequences
from kdtrain.distributed.collectives import gather_ranks
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.documents import Documents
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.teacher.online import OnlineTeacher, Passes
from kdtrain.teacher.side_stream import SideStream

pytestmark = pytest.mark.dist

VOCAB, ROWS, SEQ_LEN = 299, 512, 12
SETTINGS = {
    "one by one": {},
    "few tokens": {"max_tokens": 2 * SEQ_LEN},
    "together": {"together": True, "max_tokens": 4 * SEQ_LEN},
    "ahead": {"side": SideStream(torch.device("cpu"))},
}


def batch_of(seed, rows=3):
    """Other ids, and other numbers of documents, for every seed; the documents known."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, SEQ_LEN + 1), generator=generator)
    begins = torch.rand(rows, SEQ_LEN, generator=generator) < 0.1 * (seed % 5)
    begins[:, 0] = True
    places = torch.arange(SEQ_LEN).expand(rows, -1)
    positions = places - places.where(begins, 0).cummax(dim=1).values
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, SEQ_LEN), positions, torch.arange(rows))
    return Batch(*batch.tensors(), Documents.of(positions))


def unknown(batches):
    return [Batch(*batch.tensors()) for batch in batches]


def backbone_of(folder, mesh, rank):
    path = folder / f"config{rank}.json"
    path.write_text(json.dumps(tiny_config("qwen3", num_attention_heads=4, num_key_value_heads=2)))
    spec = ModelSpec(architecture=str(path), dtype="float32", attention="packed", seed=3)
    return load_backbone(spec, mesh, vocab_size=VOCAB, total_rows=ROWS, trainable=False)


def answers(teacher, step, late):
    teacher.prefetch(step)
    found = [teacher.signal(batch).hidden_states for batch in step]
    return [*found, teacher.signal(late).hidden_states]


def hidden_states(rank, world_size, folder, teacher_tp):
    """Per way of running the teacher: what documents that are known change in its answers. And how many differ."""
    mesh = Mesh.build(1 if teacher_tp > 1 else 2)
    backbone = backbone_of(folder, Mesh.build(2) if teacher_tp > 1 else mesh.without_tp(), rank)
    shard = VocabShard.of(VOCAB, mesh.tp_rank, mesh.tp_size, total_rows=ROWS)
    step, late = [batch_of(10 * mesh.dp_rank + i) for i in range(3)], batch_of(10 * mesh.dp_rank + 7, rows=1)
    known, found = None, {}
    for name, settings in SETTINGS.items():
        teacher_mesh = Mesh.build(2) if teacher_tp > 1 else Mesh()
        teacher = OnlineTeacher(backbone, mesh, shard, teacher_mesh, passes=Passes(**settings))
        seen = []
        inner = teacher._forward
        teacher._forward = lambda batch, inner=inner, seen=seen: seen.append(batch) or inner(batch)
        known = answers(teacher, step, late)
        assert seen
        for batch in seen:
            wanted = Documents.of(batch.position_ids)
            assert batch.documents.lengths == wanted.lengths
            assert torch.equal(batch.documents.offsets, wanted.offsets)
        plain = answers(teacher, unknown(step), unknown([late])[0])
        found[name] = max(float((one - other).abs().max()) for one, other in zip(known, plain, strict=True))
    counts = gather_ranks(torch.tensor(len(step[1].documents.lengths)), mesh.world_group).tolist()
    return found, counts


@pytest.mark.parametrize("teacher_tp", [1, 2])
def test_a_teacher_takes_the_documents_of_all_its_sequences_from_the_batches(rank_pool, tmp_path, teacher_tp):
    """teacher_tp 1: two ranks share out sequences. 2: two replicas, whose documents differ, share a teacher."""
    for found, counts in rank_pool(2).run(hidden_states, folder=tmp_path, teacher_tp=teacher_tp):
        assert found == dict.fromkeys(SETTINGS, 0.0)
        assert (len(set(counts)) == 2) == (teacher_tp == 2), "the replicas' documents should differ"


def parts(rank, world_size, folder):
    mesh = Mesh.build(1, 2)
    backbone = backbone_of(folder, mesh, rank)
    whole = batch_of(4)
    part = cut_sequences(whole, mesh.cp_rank, 2)
    known, read = backbone.hidden_states(part), backbone.hidden_states(Batch(*part.tensors()))
    assert torch.equal(known, read)
    alone = backbone_of(folder, Mesh(), rank).hidden_states(whole).view(3, SEQ_LEN, -1)
    half = SEQ_LEN // 2
    wanted = alone[:, mesh.cp_rank * half :][:, :half].flatten(0, 1)
    return float((known - wanted).abs().max()), len(whole.documents.lengths)


def test_ranks_that_hold_parts_of_sequences_take_the_documents_of_the_whole(rank_pool, tmp_path):
    for difference, count in rank_pool(2).run(parts, folder=tmp_path):
        assert difference < 1e-5
        assert count > 3
