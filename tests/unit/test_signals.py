"""What a signal refuses, and who may know how a dense one is laid out over replicas."""

from pathlib import Path

import pytest
import torch

from kdtrain.batch import Batch
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import divergence_spec
from kdtrain.losses.matrix import TARGETS
from kdtrain.teacher.online import OnlineTeacher
from kdtrain.teacher.remote import RemoteTeacher
from kdtrain.teacher.signal import DenseSignal, HeadLayout, SparseSignal
from kdtrain.teacher.signal_loss import LossWeights, signal_loss
from kdtrain.teacher.signal_measures import kl_sum, nll_sums
from tests.support.loss_cases import random_case
from tests.support.sparse_cases import sparse_case

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 11
LAYOUT = HeadLayout(VocabShard.of(VOCAB, multiple=1), None, 1 << 16)
IDS = torch.zeros(2, 3, dtype=torch.int64)
BATCH = Batch(IDS, IDS, torch.ones(2, 3), IDS, IDS[:, 0])


def sparse(scheme, **settings):
    target = sparse_case(6, VOCAB, scheme, width=4).target
    return SparseSignal(target, **{"kind": scheme, "temperature": 1.0, **settings})


def loss(signal, divergence):
    base, weight = random_case(6, VOCAB), torch.ones(6)
    weights = LossWeights(weight, weight)
    return signal_loss(base.hidden_s, base.head_s, signal, BATCH, weights, divergence_spec(divergence), LAYOUT)


@pytest.mark.parametrize(("scheme", "kind"), [("top_k_tail", "top_k"), ("sampled", "top_k_tail"), ("top_k", "dense")])
def test_a_kind_that_the_record_is_not_is_refused(scheme, kind):
    with pytest.raises(ValueError, match=f"kind = '{kind}' of a sparse signal, but its target is {scheme} or cond"):
        sparse(scheme, kind=kind)


def test_a_divergence_that_is_undefined_or_biased_on_the_kind_is_refused_unless_bias_is_accepted():
    with pytest.raises(ValueError, match="'logit_mse' on target = 'top_k_tail' is refused: it compares logits"):
        loss(sparse("top_k_tail", allow_biased=True), "logit_mse")
    with pytest.raises(ValueError, match="'forward_kl' on target = 'conditional' is biased"):
        loss(sparse("top_k_tail", kind="conditional"), "forward_kl")
    assert torch.isfinite(loss(sparse("top_k_tail", kind="conditional", allow_biased=True), "forward_kl").loss)


def test_a_record_of_another_temperature_than_the_divergences_is_refused():
    with pytest.raises(ValueError, match="temperature = 1 of the divergence, but the signal's record was made at 2"):
        loss(sparse("top_k_tail", temperature=2.0), "forward_kl")


def test_measures_that_a_record_does_not_determine_are_refused_with_the_reason():
    dense = DenseSignal(torch.zeros(6, 4), HeadShard(torch.zeros(VOCAB, 4)))
    with pytest.raises(ValueError, match=r"cross-entropy of a sampled signal .* no probability"):
        nll_sums(sparse("sampled"), [IDS], BATCH.loss_mask, LAYOUT)
    for one, other, kinds in (
        (dense, sparse("top_k"), "a dense and a top_k"),
        (sparse("top_k"), dense, "a top_k and a dense"),
        (sparse("top_k"), sparse("top_k"), "a top_k and a top_k"),
    ):
        with pytest.raises(ValueError, match=f"KL between {kinds} signal is undefined"):
            kl_sum(one, other, BATCH, LAYOUT)


def test_kinds_of_signals_and_sources_are_rows_of_the_loss_matrix():
    assert {DenseSignal.kind, OnlineTeacher.kind, RemoteTeacher.kind} == {"dense"}
    assert {"dense", sparse("top_k").kind} <= set(TARGETS)


def test_only_the_teacher_package_knows_how_signals_are_resharded():
    readers = {
        path.relative_to(ROOT).as_posix()
        for folder in ("kdtrain", "launch", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if "resharding" in path.read_text(encoding="utf-8").lower()
    }
    assert readers
    assert all(path.startswith("kdtrain/teacher/") for path in readers), readers
