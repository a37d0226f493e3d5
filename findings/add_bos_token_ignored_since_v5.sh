#!/bin/bash
# transformers 5.24.0 against 4.57.1: "add_bos_token": true in tokenizer_config.json no longer does anything.
#
# For a Llama-like tokenizer whose tokenizer.json has no post-processor, 4.57.1 makes one from the setting and puts <s>
# before every text. 5.24.0 reads the same folder without a word, puts nothing there and reports add_bos_token False. A
# model that was trained with <s> before every text gets it from one release and not from the other: other perplexities,
# other targets of a teacher, other corpora.
#
# Seen: 4.57.1 [0, 2, 3], 5.24.0 [2, 3].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/read.py" <<'PY'
import json, sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, __version__

folder = Path(sys.argv[1])
folder.mkdir()
tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4}, merges=[], unk_token="<unk>"))
tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
tokenizer.save(str(folder / "tokenizer.json"))
settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "add_bos_token": True}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
print(__version__, AutoTokenizer.from_pretrained(folder)("ab").input_ids)
PY
for version in 4.57.1 5.24.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "transformers==$version" numpy==2.4.6 >"$work/pip.log" 2>&1 || {
        tail -n 5 "$work/pip.log" >&2
        exit 1
    }
    HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/$version/bin/python" "$work/read.py" "$work/folder_$version"
done | tee "$work/seen"
grep -qx "4.57.1 \[0, 2, 3\]" "$work/seen"
grep -qx "5.24.0 \[2, 3\]" "$work/seen"
