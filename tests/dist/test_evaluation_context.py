"""What is reported of sequences that ranks share: the means of whole sequences, each token counted once."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.data.context import cut_sequences
from kdtrain.dist.mesh import Mesh
from kdtrain.evaluation.validation import EVAL_METRICS, Validation
from kdtrain.models.backbone import call_with_head
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.objectives.base import HeadLayout
from kdtrain.teacher.online import OnlineTeacher
from kdtrain.testing.validation_reference import favour_tokens, reference_means, uneven_batches

pytestmark = pytest.mark.dist

VOCAB, SEQ_LEN = 300, 12
SHAPES = ((3, 11), (1, 1), (2, 0), (3, 8))
"""(sequences, valid tokens of the first): the second part of most sequences counts nothing."""
MODELS = {
    "student": tiny_config("qwen3", vocab_size=VOCAB),
    "teacher": tiny_config("gemma3", vocab_size=VOCAB, sliding_window=4, final_logit_softcapping=5.0),
}


def evaluate(rank, world_size, root, tp, cp):
    """The means on this rank. Data ranks take every other batch."""
    mesh = Mesh.build(tp, cp)

    def load(name, mesh, rows):
        spec = ModelSpec(weights=f"{root}/{name}", dtype="float32")
        return load_backbone(spec, mesh, vocab_size=VOCAB, total_rows=rows, trainable=False)

    student = load("student", mesh, VOCAB)
    whole = mesh.without_tp()
    source = OnlineTeacher(load("teacher", whole, student.shard.rows * tp), mesh, student.shard, whole)
    layout = HeadLayout(student.shard, mesh.tp_group, slab_bytes=32 * 1024 * 3)
    batches = [cut_sequences(b, mesh.cp_rank, cp) for b in uneven_batches(VOCAB, SHAPES, SEQ_LEN)]
    validation = Validation(lambda batch, head_fn: call_with_head(student, batch, head_fn), source, layout, mesh)
    return validation.run(batches[mesh.dp_rank :: mesh.dp_size], torch.device("cpu"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("models"), {}
    for seed, (name, settings) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(settings["model_type"], **{k: v for k, v in settings.items() if k != "model_type"})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        favour_tokens(model, (3, 7, 290))
        model.save_pretrained(root / name)
        found[name] = model.double()
    return root, found


@pytest.mark.parametrize(("world_size", "tp", "cp"), [(2, 1, 2), (4, 2, 2), (4, 1, 2)])
def test_every_metric_is_that_of_whole_sequences(rank_pool, models, world_size, tp, cp):
    root, stock = models
    want = reference_means(stock["student"], stock["teacher"], uneven_batches(VOCAB, SHAPES, SEQ_LEN), VOCAB)
    assert set(want) == set(EVAL_METRICS)
    answers = rank_pool(world_size).run(evaluate, root=str(root), tp=tp, cp=cp)
    for answer in answers:
        assert answer == pytest.approx(want, rel=3e-5)
    assert answers[0] == answers[-1]
