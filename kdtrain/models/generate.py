"""Generate a line of text from an exported model, to check that `AutoModelForCausalLM` can load and run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def continue_text(folder: Path, prompt: str, *, max_new_tokens: int = 40) -> str:
    """The prompt and its greedy continuation by the model in `folder`, repetition discouraged.

    Does not access the network.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model.train(False)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.3,
        pad_token_id=0,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
