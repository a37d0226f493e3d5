"""Attention choice and FLOP counts."""

import json
from types import SimpleNamespace

import pytest

from kdtrain.dist.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.models.attention import resolve_attention
from kdtrain.models.flops import (
    forward_flops_per_token,
    matmul_parameters,
    mfu,
    peak_flops,
    training_flops_per_token,
)
from kdtrain.models.tiny import tiny_config


def test_auto_means_sdpa_on_a_cpu_and_says_why():
    choice, reason = resolve_attention("auto", device_type="cpu", dtype="bfloat16")
    assert choice == "sdpa"
    assert "needs a CUDA device" in reason


def test_an_architecture_without_sdpa_gets_eager():
    assert resolve_attention("auto", device_type="cpu", dtype="float32", has_sdpa=False)[0] == "eager"
    with pytest.raises(ConfigError, match="cannot use torch's scaled"):
        resolve_attention("sdpa", device_type="cpu", dtype="float32", has_sdpa=False)


def test_an_architecture_without_flash_attention_does_not_get_it():
    choice, reason = resolve_attention("auto", device_type="cuda", dtype="bfloat16", has_flash=False)
    assert choice == "sdpa"
    assert "architecture cannot use flash-attention" in reason
    with pytest.raises(ConfigError, match="architecture cannot use flash-attention"):
        resolve_attention("flash_attention_2", device_type="cuda", dtype="bfloat16", has_flash=False)


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_an_architecture_is_asked_whether_it_can_do_flash_attention(tmp_path, monkeypatch, name):
    import kdtrain.models.load as loading

    (tmp_path / "config.json").write_text(json.dumps({**tiny_config("llama"), "model_type": name}))
    asked = []

    def stop(wanted, **facts):
        asked.append(facts["has_flash"])
        raise ConfigError("enough")

    monkeypatch.setattr(loading, "resolve_attention", stop)
    with pytest.raises(ConfigError, match="enough"):
        loading.load_backbone(loading.ModelSpec(architecture=str(tmp_path)), Mesh(), vocab_size=101, trainable=False)
    assert asked == [name == "llama"]


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "match"),
    [
        ("flash_attention_2", "cpu", "bfloat16", "needs a CUDA device"),
        ("flash_attention_2", "cuda", "float32", "needs bfloat16"),
        ("flash", "cuda", "bfloat16", "not known"),
    ],
)
def test_an_explicit_choice_that_cannot_work_is_an_error(wanted, device, dtype, match):
    with pytest.raises(ConfigError, match=match):
        resolve_attention(wanted, device_type=device, dtype=dtype)


def test_an_explicit_choice_that_works_is_taken():
    assert resolve_attention("eager", device_type="cpu", dtype="float32") == ("eager", "asked for")


def config_of(*, tied):
    return SimpleNamespace(
        vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
        tie_word_embeddings=tied,
    )  # fmt: skip


def test_flops_count_the_head_once_and_attention_by_length():
    assert matmul_parameters(config_of(tied=True), 500_000) == 500_000
    assert matmul_parameters(config_of(tied=False), 500_000) == 500_000 - 64_000
    short, long = (forward_flops_per_token(config_of(tied=True), 500_000, length) for length in (128, 256))
    assert long - short == 2 * 3 * 128 * 64
    assert short == 2 * 500_000 + 2 * 3 * 128 * 64
    assert training_flops_per_token(config_of(tied=True), 500_000, 128) == 3 * short


def test_peaks_are_found_by_the_name_torch_reports():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H200 NVL") == 835e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA L40") == 181e12
    assert peak_flops("NVIDIA A10G") is None, "another chip than the A10"
    assert peak_flops("cpu") is None
    assert mfu(1000.0, 98.9e9, 1, "NVIDIA H200") == pytest.approx(0.1)
    assert mfu(1000.0, 1.0, 1, "cpu") is None
