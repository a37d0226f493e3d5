#!/bin/bash
# flash-attn 2.8.3.post2 and flash-attn-4 4.0.0b36 install 20 files of the same names, all with other contents.
#
# flash-attn brings an early flash_attn/cute of its own, into which flash-attn-4 installs. pip says nothing in either
# order. With flash-attn last, flash_attn.cute is a mixture of two releases under flash-attn-4's version; removing
# flash-attn then removes flash-attn-4's __init__.py and interface.py. transformers 5.24.0 looks at the distribution
# alone, and takes flash-attn-4 as available in all of these cases. (Built without its CUDA code by flash-attn's own
# switch: the Python files are the same.)
#
# Seen, of flash-attn-4's files: alone 0 replaced, 0 missing; then flash-attn: 20 replaced, 0 missing; flash-attn
# removed again: 0 replaced, 20 missing. pip lists flash-attn-4 4.0.0b36 each time.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() {
    "$work/venv/bin/pip" "$@" >"$work/pip.log" 2>&1 || {
        tail -n 5 "$work/pip.log" >&2
        exit 1
    }
}
cat >"$work/compare.py" <<'PY'
import base64, hashlib, sys
from importlib import metadata

found = metadata.distribution("flash-attn-4")
replaced = missing = 0
for file in found.files:
    path = file.locate()
    if file.hash is None or file.suffix != ".py":
        continue
    if not path.exists():
        missing += 1
    elif base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=") != file.hash.value:
        replaced += 1
print(f"{sys.argv[1]}: flash-attn-4 {found.version}, {replaced} replaced, {missing} missing")
PY
compare() { "$work/venv/bin/python" "$work/compare.py" "$1" | tee -a "$work/seen"; }
pip install torch==2.13.0 numpy==2.4.6 packaging==26.4 psutil==7.2.2 ninja==1.13.2 setuptools==84.2.1 wheel==0.48.0
export FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE
pip wheel flash-attn==2.8.3.post2 --no-deps --no-build-isolation -w "$work/wheels"
pip install --no-deps flash-attn-4==4.0.0b36
compare "alone"
pip install --no-deps "$work"/wheels/flash_attn-2.8.3.post2-*.whl
compare "then flash-attn"
pip uninstall -y flash-attn
compare "flash-attn removed again"
grep -qx "alone: flash-attn-4 4.0.0b36, 0 replaced, 0 missing" "$work/seen"
grep -qx "then flash-attn: flash-attn-4 4.0.0b36, 20 replaced, 0 missing" "$work/seen"
grep -qx "flash-attn removed again: flash-attn-4 4.0.0b36, 0 replaced, 20 missing" "$work/seen"
