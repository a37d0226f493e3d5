#!/bin/bash
# transformers 5.24.0 (torch 2.13.0): activation checkpointing decides whether packed documents see each other.
#
# Documents packed into one row are kept apart when position_ids restart, but only in a pass without a cache, and
# use_cache is on by default, in train mode too. Activation checkpointing switches the cache off. So one training batch
# has one loss with activation checkpointing, where documents are apart, and another without it, where the second
# document reads the first: a setting that saves memory changes what is learned. use_cache=False gives the first loss in
# both. An attention mask of ones joins the documents in all of them. Without gradients (a validation pass) checkpointing
# is not in effect, so training then keeps documents apart and validation joins them.
#
# Seen, for llama, qwen3, mistral, gpt_neox and olmo2 alike: "default: SEES", "checkpointing: apart", "checkpointing, no
# gradients: SEES", "use_cache=False: apart", "use_cache=False and a mask of ones: SEES", and a loss that checkpointing changes.
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
from transformers import AutoConfig, AutoModelForCausalLM

positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])  # two documents of four tokens
ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
other = torch.tensor([[20, 21, 22, 23, 9, 10, 11, 12]])  # another first document
ones = torch.ones_like(ids)


def run(model, tokens, **more):
    return model(input_ids=tokens, position_ids=positions, labels=tokens, **more)


for kind in ("llama", "qwen3", "mistral", "gpt_neox", "olmo2"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(kind, vocab_size=64, initializer_range=0.2, pad_token_id=0, eos_token_id=1, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config).train()

    def second(**more):
        a, b = run(model, ids, **more), run(model, other, **more)
        return "SEES" if float((a.logits - b.logits)[:, 4:].detach().abs().max()) > 1e-6 else "apart"

    print(f"{kind} default: {second()}")
    print(f"{kind} use_cache=False: {second(use_cache=False)}")
    print(f"{kind} use_cache=False and a mask of ones: {second(use_cache=False, attention_mask=ones)}")
    before = float(run(model, ids).loss.detach())
    model.activation_checkpointing_enable()
    print(f"{kind} checkpointing: {second()}")
    with torch.no_grad():
        print(f"{kind} checkpointing, no gradients: {second()}")
    after = float(run(model, ids).loss.detach())
    print(f"{kind} loss: {'CHANGED' if abs(after - before) > 1e-3 else 'equal'} ({before:.4f} without, {after:.4f} with)")
PY
for kind in llama qwen3 mistral gpt_neox olmo2; do
    grep -q "^$kind default: SEES" "$work/seen"
    grep -q "^$kind use_cache=False: apart" "$work/seen"
    grep -q "^$kind use_cache=False and a mask of ones: SEES" "$work/seen"
    grep -q "^$kind checkpointing: apart" "$work/seen"
    grep -q "^$kind checkpointing, no gradients: SEES" "$work/seen"
    grep -q "^$kind loss: CHANGED" "$work/seen"
done
