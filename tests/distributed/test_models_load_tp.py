"""Loading over tensor-parallel ranks: every rank reads its slices only, and the layout changes no number."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.distributed.mesh import Mesh
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.parallel import merge_state_dict

pytestmark = pytest.mark.dist


def load_cases(rank, world_size, specs, vocab_size):
    """For each spec: this rank's parameters, elements read, and the marks and hooks of its norms inside attention."""
    mesh = Mesh.build(world_size)
    answers = []
    for spec in specs:
        backbone = load_backbone(replace(spec, seed=11), mesh, vocab_size=vocab_size, trainable=True)
        state = {name: param.detach().numpy().copy() for name, param in backbone.hf_parameters()}
        hooked = sorted(name for name, param in backbone.hf_parameters() if param._backward_hooks)
        marked = sorted(name for name, p in backbone.hf_parameters() if getattr(p, "tensor_model_parallel", False))
        rope = backbone.model.base_model.rotary_emb.inv_freq
        answers.append(
            (state, backbone.elements_read, backbone.cuts, hooked, marked, str(rope.device), str(rope.dtype))
        )
    return answers


@pytest.fixture
def folders(tmp_path):
    models = {}
    for name, tied in (("qwen3", False), ("smollm", True), ("gpt_neox", False)):
        settings = tiny_config(name, vocab_size=301, tie_word_embeddings=tied)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        torch.manual_seed(3)
        models[name] = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        models[name].save_pretrained(tmp_path / name, max_shard_size="30KB")
    return tmp_path, models


@pytest.mark.parametrize("tp", [2, 3])
def test_each_rank_reads_only_its_slices_and_together_they_cover_the_model(rank_pool, folders, tp):
    path, models = folders
    specs = [ModelSpec(weights=str(path / name), dtype="float32") for name in models]
    answers = rank_pool(tp).run(load_cases, specs=specs, vocab_size=299)
    for index, (name, model) in enumerate(models.items()):
        states = [{key: torch.from_numpy(value) for key, value in a[index][0].items()} for a in answers]
        cuts = answers[0][index][2]
        merged = merge_state_dict(states, cuts)
        want = dict(model.named_parameters())
        assert set(merged) == set(want)
        assert all(torch.equal(merged[key], want[key]) for key in want)
        replicated = sum(param.numel() for key, param in want.items() if key not in cuts)
        cut = sum(param.numel() for key, param in want.items() if key in cuts)
        assert sum(a[index][1] for a in answers) == cut + tp * replicated, name
        for answer in answers:
            assert answer[index][1] < cut, f"{name}: a rank read more than its share"
            assert answer[index][4] == sorted(cuts), "every cut parameter is marked, no other"
            assert answer[index][5:] == ("cpu", "torch.float32")
    norms = answers[0][0][3]
    assert len(norms) == 4
    assert all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in norms)


def test_random_model_is_the_same_in_every_layout(rank_pool):
    specs = [ModelSpec(architecture="llama-5m", dtype="float32")]
    one = load_cases(0, 1, specs, 700)[0][0]
    two = rank_pool(2).run(load_cases, specs=specs, vocab_size=700)
    merged = merge_state_dict(
        [{key: torch.from_numpy(value) for key, value in answer[0][0].items()} for answer in two], two[0][0][2]
    )
    for key, value in merged.items():
        assert torch.equal(value, torch.from_numpy(one[key])[: value.shape[0]]), key


FUSED = {"gpt2": {}, "phi3": {}, "llama": {"num_attention_heads": 4, "num_key_value_heads": 2}}


def local_states(rank, world_size, specs):
    """For each spec: this rank's parameters, elements read, cuts, and whether k_proj sums its gradient."""
    mesh = Mesh.build(world_size)
    answers = []
    for spec in specs:
        backbone = load_backbone(spec, mesh, vocab_size=299, trainable=True)
        params = dict(backbone.hf_parameters())
        hooked = [name for name, param in params.items() if "k_proj" in name and param._backward_hooks]
        state = {name: param.detach().numpy().copy() for name, param in params.items()}
        answers.append((state, backbone.elements_read, backbone.cuts, hooked))
    return answers


@pytest.mark.parametrize("tp", [2, 4])
def test_fused_and_shared_parameters_are_read_slice_by_slice(rank_pool, tmp_path, tp):
    models = {}
    for name, changes in FUSED.items():
        settings = tiny_config(name, vocab_size=301, **changes)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        models[name] = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        models[name].save_pretrained(tmp_path / name)
    specs = [ModelSpec(weights=str(tmp_path / name), dtype="float32") for name in models]
    answers = rank_pool(tp).run(local_states, specs=specs)
    for index, (name, model) in enumerate(models.items()):
        cuts = answers[0][index][2]
        states = [{key: torch.from_numpy(value) for key, value in a[index][0].items()} for a in answers]
        want = dict(model.named_parameters())
        merged = merge_state_dict(states, cuts)
        assert set(merged) == set(want)
        assert all(torch.equal(merged[key], want[key]) for key in want), name
        shared = any(cut.shared for cut in cuts.values())
        assert shared == (name == "llama" and tp == 4)
        assert len(answers[0][index][3]) == 2 * shared
        for answer in answers:
            assert answer[index][1] < sum(param.numel() for param in want.values()), "a rank read everything"
