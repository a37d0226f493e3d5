"""The documents of a batch: found once on the host, correct after slicing, joining and moving the batch."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdtrain.batch import Batch
from kdtrain.data.context import Share, cut_sequences
from kdtrain.data.loader import StepLoader, StepShape, validation_batches
from kdtrain.data.packing import PackingSpec
from kdtrain.documents import Documents
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

aten = torch.ops.aten


def positions_of(rows):
    """[B, S] of rows of document lengths; the first document of each continues from an earlier sequence."""
    return torch.tensor([[i + 7 * (n == 0) for n, size in enumerate(row) for i in range(size)] for row in rows])


def compositions(size):
    """Every way to fill a sequence of `size` tokens with documents."""
    for cuts in itertools.product((False, True), repeat=size - 1):
        row = [1]
        for cut in cuts:
            row = [*row, 1] if cut else [*row[:-1], row[-1] + 1]
        yield tuple(row)


def batch_of(positions):
    ids = torch.arange(positions.numel()).view_as(positions)
    keys = torch.arange(len(positions))
    return Batch(ids, ids + 1, torch.ones(ids.shape), positions, keys, Documents.of(positions))


def same(found, wanted):
    assert found is not None
    assert (found.lengths, found.seq_len, found.firsts) == (wanted.lengths, wanted.seq_len, wanted.firsts)
    assert found.offsets.dtype == torch.int32
    assert torch.equal(found.offsets, wanted.offsets)
    assert found.offsets.is_contiguous()
    return True


def test_boundaries_of_every_way_to_fill_two_sequences():
    for rows in itertools.product(compositions(5), repeat=2):
        found = Documents.of(positions_of(rows))
        lengths = [length for row in rows for length in row]
        assert found.lengths == tuple(lengths)
        assert found.offsets.tolist() == [0, *itertools.accumulate(lengths)]
        assert found.firsts == (0, len(rows[0]), len(lengths))
        assert (found.shape, found.num_tokens, found.longest) == ((2, 5), 10, max(lengths))


def test_every_part_and_join_of_sequences_has_the_documents_of_its_positions():
    for rows in itertools.product(compositions(3), repeat=3):
        positions = positions_of(rows)
        whole = batch_of(positions)
        for start, stop in itertools.combinations(range(4), 2):
            part = whole.rows(start, stop)
            assert same(part.documents, Documents.of(positions[start:stop]))
            for other in range(3):
                joined = Batch.cat([part, whole.rows(other, other + 1), part])
                assert same(joined.documents, Documents.of(joined.position_ids))
        for limit in (1, 3, 6, 7, None):
            for part in whole.portions(limit):
                assert same(part.documents, Documents.of(part.position_ids))


def test_cost_of_slicing_documents_is_linear():
    """A step's micro-batches together: 512 sequences of 200 documents each, one at a time."""
    documents = Documents.of(torch.zeros(512, 200, dtype=torch.int64))
    reads = 0

    class Counted(tuple):
        def __getitem__(self, key):
            nonlocal reads
            found = super().__getitem__(key)
            reads += len(found) if isinstance(key, slice) else 1
            return found

        def __iter__(self):
            raise AssertionError("all documents were looked at for one sequence")

    for name in ("lengths", "firsts"):
        object.__setattr__(documents, name, Counted(getattr(documents, name)))
    for row in range(512):
        assert documents.sequences(row, row + 1).lengths == (1,) * 200
    assert reads == 512 * (200 + 2)


def test_documents_that_do_not_fill_sequences_are_refused():
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"documents of \(3, 5\) tokens do not fill sequences of 4"):
        Documents((3, 5), 4, offsets)
    with pytest.raises(ValueError, match=r"of sequences of \[2, 3\] tokens"):
        Documents.cat([Documents.of(torch.zeros(1, size, dtype=torch.int64)) for size in (2, 3)])


def test_batch_keeps_documents_only_while_they_are_valid():
    batch = batch_of(positions_of([(2, 1), (1, 2)]))
    unknown = Batch(*batch.tensors())
    assert unknown.documents is unknown.rows(0, 1).documents is unknown.to("meta").documents is None
    assert Batch.cat([batch, unknown]).documents is Batch.cat([unknown, batch]).documents is None
    assert batch.map(lambda values: values.flip(0)).documents is None


def test_part_of_sequences_keeps_documents_of_whole_sequences():
    positions = positions_of([(2, 4, 2), (8,)])
    batch = batch_of(positions)
    for rank in range(4):
        part = cut_sequences(batch, rank, 4)
        assert same(part.documents, Documents.of(positions))
        assert same(part.rows(1, 2).documents, Documents.of(positions[1:]))
        assert part.host is None
        assert part.to("meta").host is part
        assert cut_sequences(batch.to("meta"), rank, 4).host is None, "that is the whole"


def test_moved_batch_moves_offsets_and_keeps_host_copy():
    batch = batch_of(positions_of([(2, 1), (1, 2)]))
    moved = batch.to("meta")
    assert {values.device.type for values in moved.memory()} == {"meta"}
    assert len(moved.memory()) == len(moved.tensors()) + 1
    assert moved.documents.lengths == (2, 1, 1, 2)
    assert moved.on_host() is batch
    assert batch.on_host() is batch
    assert moved.to("meta").on_host() is batch
    assert moved.rows(0, 1).host is Batch.cat([moved, moved]).host is None, "not that of these sequences"
    with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
        moved.rows(0, 1).on_host()


class Copies(TorchDispatchMode):
    """Records copies to another device, and whether the host waits for them."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not aten._to_copy.default:
            return func(*args, **(kwargs or {}))
        self.waits.append(not kwargs.get("non_blocking", False))
        return torch.zeros_like(args[0], device=kwargs["device"])


def test_host_waits_only_for_copies_to_the_host():
    """Without a wait, a copy to the host could be read before it is complete."""
    batch = batch_of(positions_of([(2, 1), (1, 2)]))
    with Copies() as there:
        moved = batch.to("meta")
    with Copies() as back:
        copied = Batch(*moved.tensors(), moved.documents).on_host()
    assert there.waits == [False] * 6
    assert back.waits == [True] * 6
    assert copied.input_ids.is_cpu
    assert copied.documents.offsets.is_cpu


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return write_store(folder / "store", random_documents(20, seed=3), write_tokenizer(folder / "tokenizer"))


def loader_of(store, reset_positions=True, **settings):
    packing = PackingSpec(8, reset_positions=reset_positions)
    return StepLoader([store], packing=packing, shape=StepShape(4, 2), **settings)


@pytest.mark.parametrize("reset_positions", [True, False])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_loader_and_validation_set_documents_of_whole_sequences(store, reset_positions, prefetch):
    whole, part = (
        loader_of(store, reset_positions, prefetch=prefetch, **cut)
        for cut in ({}, {"share": Share(cp_rank=1, cp_size=2)})
    )
    for batch, cut in zip(next(whole), next(part), strict=True):
        assert same(batch.documents, Documents.of(batch.position_ids))
        assert same(cut.documents, batch.documents)
    whole.close()
    part.close()
    packing = PackingSpec(8, reset_positions=reset_positions)
    for cut in ({}, {"share": Share(cp_rank=1, cp_size=2)}):
        found = list(validation_batches(store, packing=packing, sequences_per_batch=3, **cut))
        for batch, plain in zip(found, validation_batches(store, packing=packing, sequences_per_batch=3), strict=True):
            assert same(batch.documents, Documents.of(plain.position_ids))


class Pins(TorchDispatchMode):
    """Records which tensors are pinned: without a CUDA device torch cannot pin them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._pin_memory.default:
            self.seen.append(args[0])
            return args[0].clone()
        return False if func is aten.is_pinned.default else func(*args, **(kwargs or {}))


def test_all_tensors_are_pinned_only_with_pin_memory(store):
    with Pins() as pins:
        plain = next(loader_of(store, prefetch=0))
        assert pins.seen == []
        step = next(loader_of(store, prefetch=0, pin_memory=True))
    sources = {id(values) for values in pins.seen}
    assert len(sources) == len(pins.seen) == len(step) * 6
    for batch, other in zip(step, plain, strict=True):
        assert same(batch.documents, other.documents)
        for values, wanted in zip(batch.tensors(), other.tensors(), strict=True):
            assert torch.equal(values, wanted)
            assert id(values) not in sources
