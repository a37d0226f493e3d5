#!/bin/bash
# transformers 5.24.0 (torch 2.13.0): with rope_type "dynamic", the same input gives other logits after a longer one.
#
# The rotary module keeps the table of the longest pass it has seen until a pass is shorter than
# max_position_embeddings. So a model with max_position_embeddings 16 answers 24 tokens in one way when it is new and in
# another after a pass of 64 tokens, and even 16 tokens, exactly what it was made for, keep the table of the 64.
# A teacher's targets would depend on the order of its batches.
#
# Seen: lengths 8: equal, 16: DIFFERENT, 24: DIFFERENT.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6 >"$work/pip.log" 2>&1 || {
    tail -n 5 "$work/pip.log" >&2
    exit 1
}
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY' | tee "$work/seen"
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=16, rope_parameters=rope,
                                     initializer_range=0.5)).eval()
tokens = torch.randint(0, 64, (1, 64))


def logits(length):
    with torch.no_grad():
        return model(input_ids=tokens[:, :length]).logits


for length in (8, 16, 24):
    logits(8)  # shorter than 16: the module goes back to its first table
    before = logits(length)
    logits(64)
    difference = float((logits(length) - before).abs().max())
    print(f"{length} tokens, before and after a pass of 64: {'equal' if difference < 1e-5 else 'DIFFERENT'} ({difference:.2g})")
PY
grep -q "^8 tokens, .*: equal" "$work/seen"
grep -q "^16 tokens, .*: DIFFERENT" "$work/seen"
grep -q "^24 tokens, .*: DIFFERENT" "$work/seen"
