"""Sizes beyond which torch's attention kernels are wrong: the numbers of the reports, one below and one above."""

import pytest

from kdtrain.models.attention_limits import flash_fits, sequences_per_call, size_obstacle

SMALL = dict(device_type="cuda", packed=True, seq_len=4096, sequences=8, heads=32, head_width=128)


def obstacle(implementation, **changes):
    return size_obstacle(implementation, **{**SMALL, **changes})


@pytest.mark.parametrize("name", ["eager", "sdpa", "packed", "flash_attention_2", "flash_attention_3"])
def test_usual_sizes_are_accepted(name):
    assert obstacle(name) is None
    assert obstacle(name, packed=False, seq_len=32768, sequences=1) is None


def test_masked_sdpa_is_refused_where_s_squared_exceeds_32_bits():
    assert obstacle("sdpa", seq_len=46340, sequences=1, heads=8) is None
    assert "46340" in obstacle("sdpa", seq_len=46341, sequences=1, heads=8)
    assert obstacle("sdpa", seq_len=46341, sequences=1, heads=8, packed=False) is None  # no mask
    assert obstacle("sdpa", seq_len=46341, sequences=1, heads=8, device_type="cpu") is None
    assert obstacle("packed", seq_len=46341, sequences=1, heads=8) is None


def test_flash_is_refused_where_its_buffer_exceeds_32_bits():
    assert obstacle("sdpa", packed=False, seq_len=65408, sequences=8) is None
    assert "gradients" in obstacle("sdpa", packed=False, seq_len=65409, sequences=8)  # rounded up to 65536
    assert "gradients" in obstacle("flash_attention_2", seq_len=65536, sequences=8)
    assert obstacle("packed", seq_len=65536, sequences=8) is None, "our own cuts its calls"
    assert "1 x 524288" in obstacle("packed", seq_len=524288, sequences=1)
    # a width of 80 is computed as 96
    assert obstacle("packed", seq_len=2**19, sequences=1, heads=48, head_width=80) is not None
    assert obstacle("packed", seq_len=2**19, sequences=1, heads=42, head_width=80) is None


def test_sequences_are_limited_by_the_grid_axis():
    tiny = {"packed": False, "seq_len": 1, "heads": 1, "head_width": 8}
    assert obstacle("sdpa", sequences=65535, **tiny) is None
    assert "65535" in obstacle("sdpa", sequences=65536, **tiny)
    assert obstacle("packed", sequences=65536, **tiny) is None


def test_calls_are_split_below_the_reported_failure():
    # Dao-AILab/flash-attention 2260: 8300 sequences of one token, 16 heads of 128
    assert not flash_fits(8300, 8300, 16, 128)
    assert flash_fits(4000, 4000, 16, 128)
    assert sequences_per_call(1, 16, 128) == 8191
    assert sequences_per_call(1, 1, 8) == 65535
    assert sequences_per_call(2**20, 32, 128) == 1
