"""Metrics of an evaluation in every layout equal those of the float64 log-softmax of stock models."""

import json

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
from tests.support.validation_reference import favour_tokens, reference_means, uneven_batches

pytestmark = pytest.mark.dist

VOCAB = 450
SHAPES = ((3, 9), (1, 1), (2, 0), (3, 6))
"""Odd numbers of sequences, which two ranks cannot share out evenly."""

TEACHERS = {
    "gemma3": tiny_config("gemma3", vocab_size=521),  # soft-capped logits, scaled embedding
    "granite": {**tiny_config("llama", vocab_size=521), "model_type": "granite", "logits_scaling": 4.0},
    "phi": {**tiny_config("llama", vocab_size=521), "model_type": "phi", "num_key_value_heads": 8},  # bias in the head
}
STUDENT = tiny_config("smollm", vocab_size=460)


def evaluate(rank, world_size, root, teacher, tp, layout):
    """The means on this rank. Data ranks take every other batch."""
    mesh = Mesh.build(tp)
    whole = mesh if layout == "tp" else Mesh()

    def load(name, mesh, rows):
        spec = ModelSpec(weights=f"{root}/{name}", dtype="float32")
        return load_backbone(spec, mesh, vocab_size=VOCAB, total_rows=rows, trainable=False)

    student = load("student", mesh, 521)
    source = OnlineTeacher(load(teacher, whole, student.shard.rows * mesh.tp_size), mesh, student.shard, whole)
    validation = Validation(
        lambda batch, head_fn: call_with_head(student, batch, head_fn),
        source,
        HeadLayout(student.shard, mesh.tp_group, slab_bytes=32 * 1024 * 3),
        mesh,
    )
    return validation.run(uneven_batches(VOCAB, SHAPES)[mesh.dp_rank :: mesh.dp_size], torch.device("cpu"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = {}
    for seed, (name, settings) in enumerate({"student": STUDENT, **TEACHERS}.items()):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            settings["model_type"], **{k: v for k, v in settings.items() if k != "model_type"}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for param in model.parameters():  # a bias begins at zero, where losing it would not show
                param.add_(torch.randn_like(param), alpha=0.05)
        favour_tokens(model, (3, 7, 440))  # 440 is of the second rank
        model.save_pretrained(root / name)
        found[name] = model.double()
    return root, found


@pytest.mark.parametrize(
    ("teacher", "tp", "layout"),
    [(name, 2, layout) for name in TEACHERS for layout in ("plain", "tp")] + [("gemma3", 1, "plain")],
)
def test_metrics_equal_those_of_stock_models(rank_pool, models, teacher, tp, layout):
    root, stock = models
    expected = reference_means(stock["student"], stock[teacher], uneven_batches(VOCAB, SHAPES), VOCAB)
    assert set(expected) == set(EVAL_METRICS)
    assert 0.0 < expected["eval/top1_agreement"] < 0.95
    answers = rank_pool(2).run(evaluate, root=str(root), teacher=teacher, tp=tp, layout=layout)
    for answer in answers:
        assert answer == pytest.approx(expected, rel=3e-5)
    assert answers[0] == answers[1]


def test_scaling_in_the_teachers_heads_changes_the_metrics(models):
    """Without this, a head that lost its cap, scale or bias would pass the test above."""
    batches = uneven_batches(VOCAB, SHAPES)
    root, stock = models
    for name, key, harmless in (("gemma3", "final_logit_softcapping", None), ("granite", "logits_scaling", 1.0)):
        config = AutoConfig.for_model(**{**json.loads((root / name / "config.json").read_text()), key: harmless})
        other = AutoModelForCausalLM.from_pretrained(root / name, config=config, dtype=torch.float64)
        with_it, without = (reference_means(stock["student"], m, batches, VOCAB) for m in (stock[name], other))
        assert with_it["eval/kl_to_teacher"] != pytest.approx(without["eval/kl_to_teacher"], rel=1e-3), name
    assert stock["phi"].lm_head.bias.abs().max() > 0.05
