"""Metrics of an evaluation against the float64 log-softmax of stock models, in one process."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.distributed.mesh import Mesh
from kdtrain.evaluation.validation import EVAL_METRICS, Validation
from kdtrain.models.backbone import call_with_head
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.teacher.online import OnlineTeacher
from kdtrain.teacher.signal import HeadLayout
from kdtrain.telemetry.metrics import UNITS
from tests.support.validation_reference import favour_tokens, reference_means, uneven_batches

VOCAB = 450
SHAPES = ((2, 9), (1, 1), (3, 10), (2, 0))
"""17 + 1 + 24 + 0 valid tokens: means of batch means are far from means over tokens."""


def write(path, name, seed, **changes):
    settings = tiny_config(name, **changes)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = favour_tokens(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), (3, 7, 440))
    model.save_pretrained(path)
    return model.double()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    student = write(root / "student", "smollm", 1, vocab_size=460)
    teacher = write(root / "teacher", "gemma3", 2, vocab_size=521)
    return root, student, teacher


def run(models, batches, *, with_teacher=True):
    root = models[0]
    mesh = Mesh()

    def load(name):
        spec = ModelSpec(weights=str(root / name), dtype="float32")
        return load_backbone(spec, mesh, vocab_size=VOCAB, total_rows=521, trainable=False)

    student, teacher = load("student"), load("teacher")
    validation = Validation(
        lambda batch, head_fn: call_with_head(student, batch, head_fn),
        OnlineTeacher(teacher, mesh, student.shard, mesh) if with_teacher else None,
        HeadLayout(student.shard, None, slab_bytes=16 * 128 * 9),
        mesh,
    )
    return validation.run(batches, torch.device("cpu"))


def test_metrics_are_means_over_valid_tokens_of_all_batches(models):
    batches = uneven_batches(VOCAB, SHAPES)
    counts = [int(batch.num_valid_tokens()) for batch in batches]
    assert counts == [16, 1, 24, 0]
    expected = reference_means(models[1], models[2], batches, VOCAB)
    assert set(expected) == set(EVAL_METRICS) <= set(UNITS)
    assert len({round(value, 3) for value in expected.values()}) == len(expected), (
        "two metrics could be taken for each other"
    )
    assert run(models, batches) == pytest.approx(expected, rel=2e-5)
    of_batches = [reference_means(models[1], models[2], [batch], VOCAB) for batch in batches[:3]]
    for name, value in expected.items():
        assert sum(m[name] for m in of_batches) / 3 != pytest.approx(value, rel=1e-3), f"{name}: blind to weighting"


def test_validation_without_a_teacher_measures_the_student_only(models):
    batches = uneven_batches(VOCAB, SHAPES)
    expected = reference_means(models[1], models[2], batches, VOCAB)
    assert run(models, batches, with_teacher=False) == pytest.approx(
        {"eval/val_nll": expected["eval/val_nll"]}, rel=2e-5
    )


def test_validation_without_valid_tokens_is_nan(models):
    means = run(models, uneven_batches(VOCAB, ((2, 0),)))
    assert set(means) == set(EVAL_METRICS)
    assert all(value != value for value in means.values())
