"""The sweep over transformers' causal language models: a few measured here, all of them in the committed table."""

import math
from importlib import import_module

import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.parallel.shard_tensors import split_tensor
from tests.support.tiers import fast_cases

pytestmark = pytest.mark.dist

NAMED = (
    *("gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite_swa", "llama", "minicpm3", "mistral", "olmo2"),
    # Gemma 3n: with transformers' own plan its gradients are off by a quarter
    *("gemma3n_text", "lfm2", "opt", "phi3", "qwen2", "qwen3", "qwen3_5_text", "smollm3", "xglm"),
)


@pytest.fixture(scope="module")
def bench():
    return import_module("architectures")


@pytest.fixture(scope="module")
def sweep(bench, rank_pool, tmp_path_factory):
    return bench.Sweep(tmp_path_factory.mktemp("sweep"), pool=rank_pool(2))


@pytest.mark.parametrize("model_type", fast_cases(NAMED, "gpt_neox", "llama", "phi3", "qwen3"))
def test_two_ranks_match_the_stock_class(bench, sweep, model_type):
    row = sweep.row(model_type, bench.known_types()[model_type])
    assert row.result == bench.EQUAL, row
    assert row.error < bench.TOLERANCE


def test_model_without_a_plan_is_refused_and_encoder_is_not_measured(bench, sweep):
    known = bench.known_types()
    refused = sweep.row("bloom", known["bloom"])
    assert (refused.result, refused.planned) == (bench.REFUSED, False)
    assert "declares no tensor-parallel plan" in refused.detail
    assert sweep.row("bert", known["bert"]).result == bench.ALONE
    assert sweep.row("fuyu", known["fuyu"]).result == bench.UNBUILT


def test_committed_table_lists_every_class_of_the_pinned_transformers(bench):
    import transformers

    text = bench.TABLE.read_text(encoding="utf-8")
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    named = {cell[1]: cell[0].removeprefix("| ") for cell in cells if cell[1] not in ("model_type", "---")}
    pins = (bench.common.ROOT / "constraints-cpu.txt").read_text(encoding="utf-8").splitlines()
    pinned = next(line.removeprefix("transformers==") for line in pins if line.startswith("transformers=="))
    assert f"transformers {pinned}," in text, f"run `{bench.COMMAND}`"
    if transformers.__version__ == pinned:
        assert named == bench.known_types(), f"run `{bench.COMMAND}`"
    assert "| FAILED |" not in text
    share = int(text.partition("are equal (")[2].partition(" %")[0])
    assert share >= 95


def test_worst_wrong_gradient_is_named(bench, tmp_path):
    path, why = bench.write_copy(tmp_path, "llama")
    assert not why
    stock = bench.run_stock(path)
    cuts = bench.load(path, Mesh(2, 0, 2)).cuts
    answers = [{**stock, "grads": {}} for _ in range(2)]
    for name, grad in stock["grads"].items():
        for rank, answer in enumerate(answers):
            cut = cuts.get(name)
            answer["grads"][name] = split_tensor(torch.from_numpy(grad), cut, rank).numpy()
    right = bench.errors_of(stock, cuts, answers)
    assert max(right.values()) < 1e-7
    wrong = "model.layers.1.self_attn.k_proj.weight"
    answers[1]["grads"][wrong] = 0.5 * answers[1]["grads"][wrong]
    found = bench.errors_of(stock, cuts, answers)
    assert max(found, key=found.get) == wrong
    assert found[wrong] > 0.1
    answers[1]["grads"]["model.norm.weight"] = answers[1]["grads"]["model.norm.weight"] + 1e-3
    assert math.inf in bench.errors_of(stock, cuts, answers).values()
