"""Attention choice and FLOP counts."""

from types import SimpleNamespace

import pytest

from kdtrain.errors import ConfigError
from kdtrain.models import attention
from kdtrain.models.attention import resolve_attention
from kdtrain.models.flops import (
    forward_flops_per_token,
    matmul_parameters,
    mfu,
    peak_flops,
    training_flops_per_token,
)


def without(*names):
    """The measurement of an architecture that cannot use `names`."""
    return lambda name: f"no {name} here" if name in names else None


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(attention, "flash_obstacle", lambda name: None)


def auto(device="cuda", dtype="bfloat16", **how):
    return resolve_attention("auto", device_type=device, dtype=dtype, **how)


def test_auto_takes_packed_attention_on_a_cpu_with_the_reason():
    choice, reason = auto("cpu", "float32")
    assert choice == "packed"
    assert reason == "auto: flash_attention_2 needs a CUDA device, this is cpu"


def test_auto_takes_the_first_implementation_that_the_architecture_supports(installed):
    assert auto() == ("flash_attention_2", "auto: flash-attn can be imported and the device is CUDA")
    assert auto(dtype="float32")[0] == "packed"
    assert auto(measured=without("flash_attention_2"))[0] == "packed"
    choice, reason = auto(measured=without("flash_attention_2", "packed"))
    assert (choice, reason) == ("sdpa", "auto: flash_attention_2: no flash_attention_2 here; packed: no packed here")
    assert auto(measured=without("flash_attention_2", "packed", "sdpa"))[0] == "eager"


def test_sdpa_precedes_packed_where_it_needs_no_mask(installed):
    assert auto("cpu", packed=False)[0] == "sdpa"
    assert auto("cpu", packed=False, measured=without("sdpa"))[0] == "packed"
    assert auto(packed=False)[0] == "flash_attention_2"


def test_only_needed_implementations_are_measured():
    measured = []
    resolve_attention("auto", device_type="cpu", dtype="float32", measured=measured.append)
    assert measured == ["packed"]


def test_auto_does_not_fall_back_to_eager_if_the_mask_is_too_large():
    size = without("sdpa")
    assert auto("cpu", size=size)[0] == "packed"
    with pytest.raises(ConfigError, match=r"finds no implementation(.|\n)*    eager: no sdpa here\n(.|\n)*seq_len"):
        auto("cpu", size=size, measured=without("packed"))
    assert resolve_attention("eager", device_type="cpu", dtype="float32", size=size)[0] == "eager"


@pytest.mark.parametrize("name", ["sdpa", "packed", "flash_attention_2", "flash_attention_4"])
def test_explicit_choice_is_refused_with_the_measurement(installed, name):
    for how in ({"measured": without(name)}, {"size": without(name)}):
        with pytest.raises(ConfigError, match=f"attention = '{name}' cannot be used: no {name} here"):
            resolve_attention(name, device_type="cuda", dtype="bfloat16", **how)
    assert resolve_attention(name, device_type="cuda", dtype="bfloat16", measured=without("x")) == (
        name,
        "explicit setting",
    )


@pytest.mark.parametrize(
    ("name", "least"), [("flash_attention_2", 8), ("flash_attention_3", 8), ("flash_attention_4", 9)]
)
def test_kernels_for_newer_gpus_are_not_used_on_older_ones(installed, name, least):
    def resolved(wanted, major):
        return resolve_attention(wanted, device_type="cuda", dtype="bfloat16", capability=(major, 0))[0]

    assert resolved(name, least) == resolved(name, least + 3) == name
    with pytest.raises(ConfigError, match=f"compute capability {least}.0, this is {least - 1}.0"):
        resolved(name, least - 1)
    assert resolved("auto", 8) == "flash_attention_2"
    assert resolved("auto", 7) == "packed"


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "match"),
    [
        ("flash_attention_2", "cpu", "bfloat16", "needs a CUDA device"),
        ("flash_attention_2", "cuda", "float32", "needs bfloat16"),
        ("flash", "cuda", "bfloat16", "not known"),
    ],
)
def test_explicit_choice_that_cannot_work_is_an_error(wanted, device, dtype, match):
    with pytest.raises(ConfigError, match=match):
        resolve_attention(wanted, device_type=device, dtype=dtype)


def test_explicit_choice_that_works_is_used():
    assert resolve_attention("eager", device_type="cpu", dtype="float32") == ("eager", "explicit setting")


def config_of(*, tied):
    return SimpleNamespace(
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=16,
        tie_word_embeddings=tied,
    )


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
