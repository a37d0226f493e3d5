"""Metrics under context parallelism are the means over whole sequences, with each token counted once."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.data.context import cut_sequences
from kdtrain.distributed.collectives import gather_ranks
from kdtrain.distributed.mesh import Mesh
from kdtrain.evaluation.validation import EVAL_METRICS, Validation
from kdtrain.models.backbone import call_with_head
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import TINY, tiny_config
from kdtrain.models.tiny_mixtures import mixture_config
from kdtrain.teacher.online import OnlineTeacher
from kdtrain.teacher.signal import HeadLayout
from tests.support.validation_reference import favour_tokens, reference_means, uneven_batches

pytestmark = pytest.mark.dist

VOCAB, SEQ_LEN = 300, 12
SHAPES = ((3, 11), (1, 1), (2, 0), (3, 8))
"""(sequences, valid tokens of the first): the second part of most sequences counts nothing."""
MODELS = {
    "student": tiny_config("qwen3", vocab_size=VOCAB),
    "teacher": tiny_config("gemma3", vocab_size=VOCAB, sliding_window=4, final_logit_softcapping=5.0),
}

WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    **TINY,
    "mistral": {**TINY["llama"], "model_type": "mistral", "sliding_window": 4},
    "gemma2": {**TINY["llama"], "model_type": "gemma2", "head_dim": 4, "attn_logit_softcapping": 2.0, **WINDOW},
    "cohere2": {**TINY["llama"], "model_type": "cohere2", **WINDOW},
    "phi": {**TINY["llama"], "model_type": "phi", "num_key_value_heads": 8},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "bos_token_id": None, "eos_token_id": None},
    **{kind: mixture_config(kind) for kind in ("mixtral", "qwen3_moe", "deepseek_v3")},  # the last: values are narrower
}
UNEVEN = ("smollm",)
"""Nine heads, which two ranks cannot share."""


def hidden_states(rank, world_size, folder, kinds):
    """Worst difference of any token's hidden states from those of whole sequences, per kind, of its largest value."""
    mesh, found = Mesh.build(1, world_size), {}
    (whole,) = uneven_batches(VOCAB, ((2, 9),), SEQ_LEN)
    for kind in kinds:
        spec = ModelSpec(architecture=f"{folder}/{kind}.json", dtype="float32")
        packed = kind != "gpt2"
        batch = whole if packed else dataclasses.replace(whole, position_ids=torch.arange(SEQ_LEN).expand(2, -1))
        one, ours = (
            load_backbone(spec, m, vocab_size=VOCAB, trainable=False, packed=packed).eval() for m in (Mesh(), mesh)
        )
        right = one.hidden_states(batch).view(2, SEQ_LEN, -1)
        part = cut_sequences(batch, mesh.cp_rank, mesh.cp_size)
        got = gather_ranks(ours.hidden_states(part).view(2, SEQ_LEN // world_size, -1), mesh.cp_group)
        found[kind] = float((torch.cat(list(got), 1) - right).abs().max() / right.abs().max())
    return found


def test_hidden_states_of_every_family_equal_those_of_whole_sequences(rank_pool, tmp_path):
    kinds = [kind for kind in KINDS if kind not in UNEVEN]
    for kind in kinds:
        (tmp_path / f"{kind}.json").write_text(json.dumps(KINDS[kind]))
    for found in rank_pool(2).run(hidden_states, folder=str(tmp_path), kinds=kinds):
        assert found.keys() == set(kinds)
        assert {kind: error for kind, error in found.items() if not error < 1e-5} == {}


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
        config = AutoConfig.for_model(
            settings["model_type"], **{k: v for k, v in settings.items() if k != "model_type"}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        favour_tokens(model, (3, 7, 290))
        model.save_pretrained(root / name)
        found[name] = model.double()
    return root, found


@pytest.mark.parametrize(("world_size", "tp", "cp"), [(2, 1, 2), (4, 2, 2), (4, 1, 2)])
def test_metrics_equal_those_of_whole_sequences(rank_pool, models, world_size, tp, cp):
    root, stock = models
    expected = reference_means(stock["student"], stock["teacher"], uneven_batches(VOCAB, SHAPES, SEQ_LEN), VOCAB)
    assert set(expected) == set(EVAL_METRICS)
    answers = rank_pool(world_size).run(evaluate, root=str(root), tp=tp, cp=cp)
    for answer in answers:
        assert answer == pytest.approx(expected, rel=3e-5)
    assert answers[0] == answers[-1]


def whole_teacher(rank, world_size, root):
    mesh = Mesh.build(1, world_size)
    spec = ModelSpec(weights=f"{root}/teacher", dtype="float32")
    teacher = load_backbone(spec, Mesh(), vocab_size=VOCAB, trainable=False)
    with pytest.raises(ValueError, match=r"loaded with cp 1, the student.s mesh has cp 2") as refused:
        OnlineTeacher(teacher, mesh, teacher.shard, Mesh())
    return str(refused.value)


def test_teacher_without_context_parallelism_is_refused_for_parts_of_sequences(rank_pool, models):
    assert len(set(rank_pool(2).run(whole_teacher, root=str(models[0])))) == 1
