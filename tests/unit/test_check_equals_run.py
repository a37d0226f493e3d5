"""--check accepts and refuses what the start of a run does, with the same messages.

The run is started in this process as by `run_training`, up to the engine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.engine.manifest import KINDS
from kdtrain.engine.slices import Fragment
from kdtrain.errors import CheckpointError, ConfigError, DataError, KdtrainError, ParallelError, StoreMismatch
from kdtrain.jobs import check as jobs_check
from kdtrain.jobs.build.batches import build_loader
from kdtrain.jobs.build.models import build_models, model_specs
from kdtrain.jobs.build.teacher import teacher_spec
from kdtrain.jobs.check import print_check
from kdtrain.jobs.export_hf import write_model_files
from kdtrain.jobs.header import log_header
from kdtrain.jobs.inputs import open_inputs
from kdtrain.jobs.quantized import quantize_teacher
from kdtrain.jobs.sequence_prefix import prefix_choice
from kdtrain.jobs.start import find_start
from kdtrain.models.attention import IMPLEMENTATIONS
from kdtrain.models.head import load_head
from kdtrain.models.load import ModelSpec, check_architecture, load_backbone
from kdtrain.models.tiny import save_random, tiny_config
from kdtrain.models.tiny_mixtures import write_mixture
from kdtrain.planning import estimate
from kdtrain.telemetry.jsonl_sink import JsonlSink
from kdtrain.training.checkpoints import ResumePoint
from tests.support.model_folders import check_and_load, edit_json, edit_tensors, outcome
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

LLAMA = tiny_config("llama", vocab_size=257)
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def cfg(tmp_path):
    """A run of two model folders that would start."""
    found = RunConfig()
    for role, section in (("student", found.student), ("teacher", found.teacher)):
        section.weights, section.dtype = str(write_tokenizer(tmp_path / role)), "float32"
        save_random(tmp_path / role, LLAMA, seed=len(role))
    write_store(tmp_path / "store", random_documents(40, seed=0), tmp_path / "teacher")
    found.run.output_dir, found.run.name, found.train.total_tokens = str(tmp_path / "runs"), "x", 2048
    found.data.train = [str(tmp_path / "store")]
    found.data.seq_len, found.data.sequences_per_micro_batch, found.data.tokens_per_step = 16, 2, 64
    return found


def begin(cfg):
    """What `run_training` does before it builds the engine, and how that takes a checkpoint up."""
    inputs, mesh = open_inputs(cfg, model_specs(cfg)), Mesh()
    models = build_models(cfg, inputs, mesh, torch.device("cpu"), trainable=True)
    resume_from = find_start(cfg, inputs, Path(cfg.run.output_dir) / cfg.run.name)
    loader = build_loader(cfg, inputs, mesh, prefetch=0)
    quantize_teacher(cfg, models, next(loader)[0], mesh)
    if resume_from is not None:
        checkpoint.check_model(resume_from.path, models.student)  # as checkpoint.load does
        loader.load_state_dict(checkpoint.read_state(resume_from.path)["loader"])
    folder = Path(cfg.run.output_dir) / cfg.run.name
    folder.mkdir(parents=True, exist_ok=True)
    write_model_files(folder, inputs.tokenizer_dir, cfg.student.weights)
    JsonlSink(folder / "metrics.jsonl").close()
    return models


def check(cfg):
    inputs = open_inputs(cfg, model_specs(cfg))
    print_check(cfg, inputs, prefix_choice(cfg, inputs), world_size=1)


def both(cfg):
    """Value or error of `begin`; asserts that --check gives the same error or none."""
    checked = outcome(lambda: check(cfg))
    started = outcome(lambda: begin(cfg))
    if isinstance(started, KdtrainError):
        assert (type(checked), str(checked)) == (type(started), str(started))
    else:
        assert checked is None, checked
    return started


def refused(cfg, match, kind=ConfigError):
    error = both(cfg)
    assert type(error) is kind, error
    with pytest.raises(kind, match=match):
        raise error


def quantised(folder):
    edit_tensors(folder, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn), Q + "_scale": torch.ones(1)}))
    (folder / "hf_quant_config.json").write_text("{}")


def without(name):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def without_a_shard(folder):
    (folder / "model.safetensors").unlink()
    save_random(folder, LLAMA, shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_two_sets(folder):
    save_random(folder, LLAMA, seed=9, shard_size="20KB")


def with_another_head(folder):
    edit_json(folder / "config.json", tie_word_embeddings=True)


REFUSALS = {
    "missing tensor": (without("model.norm.weight"), r"no tensor for parameter 'model\.norm\.weight'"),
    "no head": (without("lm_head.weight"), r"no tensor for the head"),
    "another shape": (lambda f: edit_json(f / "config.json", intermediate_size=40), r"has shape \(44, 32\)"),
    "fewer layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=1), "has no place in the model"),
    "more layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=3), r"'model\.layers\.2\..* are missing"),
    "cut off": (cut_off, "damaged or cut off"),
    "a shard missing": (without_a_shard, r"lacks \['model-00002-of-"),
    "two sets": (with_two_sets, "holds two sets of weights"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"only \['pytorch_model\.bin'\]"),
    "quantised": (quantised, r"stored as F8_E4M3 \(and there is hf_quant_config\.json"),
    "a mark": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "has quantization_config"),
    "tied, but not equal": (with_another_head, "the files hold two different tensors"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "not a causal model": (lambda f: edit_json(f / "config.json", model_type="t5"), "not a causal language model"),
    "a width that is a word": (lambda f: edit_json(f / "config.json", hidden_size="x"), "transformers refuses"),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", REFUSALS)
def test_check_refuses_a_model_folder_with_the_message_of_the_run(cfg, role, name):
    change, match = REFUSALS[name]
    change(Path(getattr(cfg, role).weights))
    refused(cfg, match)


def sharded(folder):
    (folder / "model.safetensors").unlink()
    save_random(folder, LLAMA, shard_size="20KB")


def base_and_tied(folder):
    save_random(folder, {**LLAMA, "tie_word_embeddings": True}, base=True)


def half(folder):
    edit_tensors(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))


def both_of_a_tied_pair(folder):
    save_random(folder, {**LLAMA, "tie_word_embeddings": True})
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))


ACCEPTED = {
    "as saved": lambda folder: None,
    "shards": sharded,
    "a base model's": base_and_tied,
    "float16": half,
    "tied, and equal": both_of_a_tied_pair,
    "a pickle besides": lambda folder: (folder / "pytorch_model.bin").touch(),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_model_folder_that_a_run_reads_passes_the_check(cfg, role, name):
    ACCEPTED[name](Path(getattr(cfg, role).weights))
    models = both(cfg)
    assert models.student.elements_read > 0 < models.teacher_backbone.elements_read


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_allow_unused_weights_accepts_tensors_without_a_place(cfg, role):
    section = getattr(cfg, role)
    edit_tensors(Path(section.weights), lambda tensors: tensors.update({"extra.weight": torch.ones(3)}))
    refused(cfg, "'extra.weight' of model.safetensors has no place")
    section.allow_unused_weights = True
    both(cfg)


def test_check_reads_every_expert_of_a_mixture(cfg):
    teacher = Path(cfg.teacher.weights)
    (teacher / "model.safetensors").unlink()
    model = write_mixture(teacher, "qwen3_moe", packed=False, vocab_size=257)
    model.save_pretrained(teacher, save_original_format=True)
    both(cfg)
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_tensors(teacher, lambda tensors: tensors.update({expert: tensors[expert][1:]}))
    refused(cfg, rf"tensor '{expert}' has shape \(39, 32\), the model needs \(40, 32\)")
    without(expert)(teacher)
    refused(cfg, "11 experts like")
    cfg.student.weights = cfg.teacher.weights
    refused(cfg, "mixture of experts")


def other_quantisation(cfg):
    pytest.importorskip("torchao")
    save_random(Path(cfg.teacher.weights), tiny_config("gpt2", vocab_size=257))
    cfg.teacher.quantize, cfg.data.reset_positions = "int8", False


def too_little_text(cfg):
    cfg.data.seq_len = cfg.data.tokens_per_step = 4096
    cfg.data.sequences_per_micro_batch = 1


def too_small_a_share(cfg):
    store = write_store(Path(cfg.data.train[0] + "2"), random_documents(40, seed=1), Path(cfg.teacher.weights))
    cfg.data.train, cfg.data.train_weights = [*cfg.data.train, str(store.path)], [1.0, 1e-9]


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (other_quantisation, ConfigError, r"teacher\.quantize = int8: GPT2LMHeadModel has Conv1D layers"),
        (too_little_text, DataError, "has no complete sequence"),
        (too_small_a_share, DataError, "less than one sequence in"),
        (lambda cfg: setattr(cfg.run, "resume", cfg.run.output_dir), CheckpointError, "no complete checkpoint there"),
        (lambda cfg: setattr(cfg.student, "attention", "flash"), ConfigError, "'flash' is not known"),
        (lambda cfg: setattr(cfg.student, "dtype", "float16"), ConfigError, "dtype = 'float16'"),
    ],
)
def test_check_refuses_settings_that_do_not_fit_models_or_data(cfg, change, kind, match):
    change(cfg)
    refused(cfg, match, kind)


def test_check_takes_the_numbers_of_stores_from_the_checkpoint_that_the_run_resumes(cfg, monkeypatch, tmp_path):
    write_store(tmp_path / "other", random_documents(60, seed=1), tmp_path / "teacher")
    cfg.data.train.append(str(tmp_path / "other"))
    inputs, loaders = open_inputs(cfg, model_specs(cfg)), []
    state = build_loader(cfg, inputs, Mesh(), prefetch=0).state_dict()
    state["stores"].reverse()  # as an older version numbered them
    monkeypatch.setattr(jobs_check, "log_stores", lambda cfg, inputs, loader: loaders.append(loader))
    monkeypatch.setattr(jobs_check, "find_start", lambda *arguments: ResumePoint(tmp_path, None))
    monkeypatch.setattr(jobs_check, "kept_prefix", lambda *arguments: None)
    monkeypatch.setattr(checkpoint, "check_model", lambda *arguments: None)
    monkeypatch.setattr(checkpoint, "read_state", lambda path: {"loader": {**state, "sequences": 8}})
    check(cfg)
    assert [loader.state_dict() for loader in loaders] == [{**state, "sequences": 8}]


def test_check_refuses_a_resume_that_the_run_refuses(cfg):
    models = both(cfg)
    inputs = open_inputs(cfg, model_specs(cfg))
    shapes = models.student.full_shapes()
    state = {"loader": {**build_loader(cfg, inputs, Mesh(), prefetch=0).state_dict(), "sequences": 4}, "origin": None}
    config = json.loads(models.student.config.to_json_string(use_diff=False))
    about = checkpoint.Description(1, shapes, {}, {"tp": 1}, config, state)
    values = {name: param[: shapes[name][0]].detach().flatten() for name, param in models.student.hf_parameters()}
    fragments = [Fragment(name, kind, 0, 0, value) for name, value in values.items() for kind in KINDS]
    root = Path(cfg.run.output_dir) / cfg.run.name / "checkpoints"
    checkpoint.write_checkpoint(root, Mesh(), about, fragments, dict.fromkeys(shapes, 1))
    both(cfg)
    cfg.run.seed = 2
    refused(cfg, r"data order differs in run\.seed: 1 in the checkpoint, 2 here", StoreMismatch)
    cfg.run.seed, cfg.run.resume = 1, "never"
    refused(cfg, r"exists, but run\.resume = never")
    cfg.run.resume = "auto"
    save_random(Path(cfg.student.weights), {**LLAMA, "intermediate_size": 40})
    refused(cfg, r"holds another model than this run trains", CheckpointError)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", ["auto", "packed", "sdpa", "eager"])
def test_check_resolves_the_configured_attention_of_either_model(cfg, role, name):
    getattr(cfg, role).attention = name
    models = both(cfg)
    found = models.student if role == "student" else models.teacher_backbone
    assert found.attention == ("packed" if name == "auto" else name)


def memory_lines(logged):
    found = [record.getMessage() for record in logged.records if record.getMessage().startswith("memory ")]
    logged.clear()
    return found


@pytest.mark.parametrize("dedicated", [False, True])
@pytest.mark.parametrize("name", ["auto", "sdpa", "eager"])
def test_check_and_run_estimate_the_same_memory(cfg, name, dedicated, logged, monkeypatch):
    """A dedicated teacher publishes its attention; here it is that of `load_backbone` on one of its ranks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(estimate, "GIB", 1)  # every byte shows
    cfg.teacher.attention = name
    if dedicated:
        cfg.teacher.layout, cfg.teacher.ranks = "dedicated", 1
    inputs = open_inputs(cfg, model_specs(cfg))
    print_check(cfg, inputs, prefix_choice(cfg, inputs), world_size=1 + dedicated)
    checked = memory_lines(logged)
    models = begin(cfg)
    if dedicated:
        head = load_head(teacher_spec(cfg), models.student.shard, device="cpu")
        models = replace(models, teacher_backbone=None, teacher_head=head, dedicated_attention=models.teacher_attention)
    log_header(cfg, inputs, models, Mesh(), torch.device("cpu"))
    assert memory_lines(logged) == checked
    assert len(checked) == 1 + dedicated


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_check_without_a_gpu_refuses_masks_too_large_for_one(cfg, role):
    getattr(cfg, role).attention = "sdpa"
    cfg.data.seq_len = 46341
    with pytest.raises(ConfigError, match=r"'sdpa' cannot be used: sequences of 46341 tokens with a mask"):
        check(cfg)


def test_check_refuses_damaged_records(cfg):
    folder = Path(cfg.run.output_dir) / cfg.run.name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{\n")
    refused(cfg, "is not a JSON record", DataError)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_check_refuses_student_files_that_break_the_export(cfg, name):
    (Path(cfg.student.weights) / name).write_text("{")
    refused(cfg, rf"student/{name} is not valid JSON")


@pytest.mark.parametrize(
    ("settings", "how", "kind", "match"),
    [
        ({"attention_dropout": 0.1}, {"tp": 2, "trainable": True}, ParallelError, "ranks would draw different masks"),
        ({"attention_dropout": 0.1}, {"tp": 2}, None, ""),
        ({}, {"tp": 16}, ParallelError, "more than the 8 query heads"),
        ({"model_type": "olmo2"}, {"tp": 2, "trainable": True, "sequence": True}, ParallelError, "gathers the tokens"),
        ({"model_type": "olmo2"}, {"tp": 2, "trainable": True}, None, ""),
        ({}, {"tp": 2}, None, ""),
        ({}, {"attention": "flash_attention_2"}, ConfigError, "needs bfloat16, this is float32"),
        ({"model_type": "gemma2", "head_dim": 8}, {"attention": "sdpa"}, ConfigError, "cannot use torch's scaled"),
        ({"model_type": "gemma2", "head_dim": 8}, {"attention": "packed"}, None, ""),
        (
            {"model_type": "stablelm"},
            {"attention": "packed"},
            ConfigError,
            "StableLmAttention does not pass its keyword",
        ),
        (
            {"model_type": "stablelm"},
            {"attention": "packed", "packed": False},
            ConfigError,
            "does not pass its keyword",
        ),
        ({"model_type": "stablelm"}, {}, None, ""),
        ({}, {"attention": "packed", "tp": 2, "trainable": True}, None, ""),
        *(
            ({}, {"attention": name, "packed": packed}, None, "")
            for name in IMPLEMENTATIONS[:3]
            for packed in (True, False)
        ),
        ({}, {"vocab_size": 102}, ConfigError, "vocab_size = 101, but the tokenizer has 102"),
    ],
)
def test_check_and_run_accept_the_same_layouts_and_attention(tmp_path, settings, how, kind, match):
    save_random(tmp_path, {**tiny_config("llama"), **settings})
    tp = how.pop("tp", 1)
    if how.get("attention") == "flash_attention_2":  # loading stops earlier, at the device, which is not a GPU
        with pytest.raises(kind, match=match):
            check_architecture(ModelSpec(weights=str(tmp_path), dtype="float32", **how), 99, Mesh())
        with pytest.raises(kind, match="needs a CUDA device"):
            load_backbone(
                ModelSpec(weights=str(tmp_path), dtype="float32", **how), Mesh(), vocab_size=99, trainable=False
            )
    elif kind is None:
        check_and_load(tmp_path, mesh=Mesh(world_size=tp, tp_size=tp), **how)
    else:
        with pytest.raises(kind, match=match):
            check_and_load(tmp_path, mesh=Mesh(world_size=tp, tp_size=tp), **how)
