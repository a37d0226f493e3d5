"""Types that several sections share."""

from __future__ import annotations

from typing import Literal

Attention = Literal["auto", "eager", "sdpa", "packed", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
Dtype = Literal["float32", "bfloat16"]
