"""Eight-bit weights of a frozen model: which, how many bytes, how far off, and what happens without the library."""

import importlib.util
import json
import sys

import pytest
import torch
import torch.nn.functional as F

from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import EXIT_CONFIG, ConfigError
from kdtrain.jobs.build.models import Models
from kdtrain.jobs.quantized import quantize_teacher
from kdtrain.losses.reference import forward_kl
from kdtrain.models.load import ModelSpec, check_architecture, load_backbone
from kdtrain.models.quantize import quantize_decoder_, require_torchao
from kdtrain.models.tiny import tiny_config
from kdtrain.models.tiny_mixtures import mixture_config
from kdtrain.teacher.online import OnlineTeacher
from kdtrain.teacher.signal import HeadLayout
from tests.support.validation_reference import uneven_batches

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
VOCAB = 299
LARGEST_ERROR = {"int8": 1 / 250, "fp8": 1 / 15}
"""Of an entry, as a part of its row's largest: half a step of 254 levels; half a unit of 3 binary digits."""


@pytest.fixture
def build(tmp_path):
    def build(family, dtype="float32", mesh=None, **changes):
        path = tmp_path / f"{family}.json"
        path.write_text(json.dumps(tiny_config(family, **changes)))
        spec = ModelSpec(architecture=str(path), dtype=dtype, attention="sdpa")
        return load_backbone(spec, mesh or Mesh(), vocab_size=VOCAB, trainable=False)

    return build


def named(backbone):
    return dict(backbone.hf_parameters())


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_the_decoders_matrices_become_eight_bits_wide_and_nothing_else(build, family, kind):
    backbone = build(family)
    was = {name: param.detach().clone() for name, param in named(backbone).items()}
    before, after = quantize_decoder_(backbone, kind)
    assert before == sum(value.nbytes for value in was.values())
    bits, quantised = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind], 0
    for name, param in named(backbone).items():
        assert not param.requires_grad
        if param.dim() == 1 or "embed" in name or "lm_head" in name:
            assert torch.equal(param, was[name]), name
            continue
        assert param.qdata.dtype == bits
        quantised += param.numel()
        error = (param.dequantize() - was[name]).abs() / was[name].abs().amax(1, keepdim=True)
        assert 0 < float(error.max()) <= LARGEST_ERROR[kind], name
        before -= 4 * param.numel() - param.numel() - 4 * len(param)  # a scale for each row
    assert quantised > 0.3 * sum(value.numel() for value in was.values())
    assert after == before or kind == "int8", "int8 keeps a zero point of a byte per row besides"
    assert after - before <= sum(len(param) for param in named(backbone).values() if param.dim() > 1)


def reference(backbone, batch):
    """Log-probabilities of the true vocabulary in float64."""
    hidden = backbone.hidden_states(batch).double()
    return F.linear(hidden, backbone.lm_head_shard.weight[:VOCAB].double())


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_reported_divergence_is_that_of_whole_float64_distributions(build, kind, caplog):
    backbone, cfg = build("qwen3"), RunConfig()
    cfg.teacher.quantize, cfg.teacher.dtype = kind, "float32"
    shard = backbone.shard
    models = Models(
        backbone, OnlineTeacher(backbone, Mesh(), shard, Mesh()), HeadLayout(shard, None, 16 * shard.rows * 3), backbone
    )
    batch = uneven_batches(VOCAB, [(3, 9)])[0]
    with torch.no_grad():
        whole = reference(backbone, batch)
        caplog.set_level("INFO", logger="kdtrain")
        cost = quantize_teacher(cfg, models, batch, Mesh())
        kl = forward_kl(reference(backbone, batch), whole)  # student, teacher
    valid = batch.loss_mask.flatten().double()
    want = float((kl * valid).sum() / valid.sum())
    assert 1e-8 < want < 0.1
    assert cost.kl == pytest.approx(want, rel=1e-3)
    assert cost.num_tokens == int(valid.sum())
    assert 0.2 < cost.bytes_share < 1
    assert f"{kind}: KL to its float32 self {cost.kl:.3g} nats/token over {cost.num_tokens} tokens" in caplog.text


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_under_bfloat16_products_are_those_of_the_rounded_weights(build, kind):
    backbone, plain = (build("qwen3", dtype="bfloat16") for _ in range(2))
    quantize_decoder_(backbone, kind)
    batch = uneven_batches(VOCAB, [(3, 9)])[0]
    for name, param in named(backbone).items():
        named(plain)[name].data = param.dequantize() if hasattr(param, "qdata") else param.data
    want, got = plain.hidden_states(batch).float(), backbone.hidden_states(batch).float()
    assert float((got - want).norm() / want.norm()) < 2e-2


def test_a_teacher_that_is_not_to_be_quantised_is_unchanged(build):
    backbone = build("qwen3")
    teacher = OnlineTeacher(backbone, Mesh(), backbone.shard, Mesh())
    models = Models(backbone, teacher, HeadLayout(backbone.shard, None, 1 << 20), backbone)
    assert quantize_teacher(RunConfig(), models, uneven_batches(VOCAB, [(1, 9)])[0], Mesh()) is None
    assert all(type(param) is torch.nn.Parameter for param in named(backbone).values())


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch, build):
    backbone = build("qwen3")
    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else real(name))
    for refused in (lambda: require_torchao("int8"), lambda: quantize_decoder_(backbone, "int8")):
        with pytest.raises(
            ConfigError, match=r"torchao is not installed\n(.*\n)*  fix: pip install .*torchao"
        ) as error:
            refused()
        assert error.value.exit_code == EXIT_CONFIG


@needs_torchao
def test_what_has_no_matrices_to_quantise_is_refused(build, tmp_path):
    backbone = build("qwen3")
    backbone.model.base_model.layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match=r"has no linear layer\n.*\n  fix: set teacher.quantize=null"):
        quantize_decoder_(backbone, "int8")
    (tmp_path / "mixture.json").write_text(json.dumps(mixture_config("mixtral")))
    spec = ModelSpec(architecture=str(tmp_path / "mixture.json"), dtype="float32")
    mixture = load_backbone(spec, Mesh(), vocab_size=VOCAB, trainable=False)
    with pytest.raises(ConfigError, match="MixtralForCausalLM is a mixture of experts"):
        quantize_decoder_(mixture, "fp8")
    check_architecture(spec, VOCAB, Mesh(), trainable=False)
    with pytest.raises(ConfigError, match="MixtralForCausalLM is a mixture of experts"):
        check_architecture(spec, VOCAB, Mesh(), trainable=False, quantize="fp8")


@needs_torchao
@pytest.mark.parametrize("tp", [1, 2])
def test_layers_that_keep_inputs_times_outputs_are_refused_in_every_layout(build, tp):
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has Conv1D layers\n.*\n  fix: set teacher.quantize=null"):
        quantize_decoder_(build("gpt2", mesh=Mesh(world_size=tp, tp_size=tp)), "fp8")
