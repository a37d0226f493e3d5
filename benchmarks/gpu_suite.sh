#!/bin/sh
# Correctness, ceilings, whole operations, peers, an overlapping teacher on one GPU; no network, deepspeed or omegaconf.
#
#   sh benchmarks/gpu_suite.sh STAGE [OUT]      STAGE: correct | sanitize | ceilings | ops | peers | overlap | all
#
# Each stage ends within ten minutes. CSV files go to OUT (default benchmarks/results). PYTHON names the interpreter,
# ARGS=--cpu runs tiny shapes on the CPU to test the control flow. Peers are used where they are installed
# (pip install liger-kernel cut-cross-entropy, or their wheels); others are listed as absent.
set -eu
cd "$(dirname -- "$0")/.."
stage=${1:?"STAGE: correct | sanitize | ceilings | ops | peers | overlap | all"}
out=${2:-benchmarks/results}
python=${PYTHON:-python}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"

run() {
    # shellcheck disable=SC2086
    timeout 590 "$python" "$@" --out "$out" ${ARGS:-}
}

sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer: absent" | tee "$out/gpu_sanitize.txt"
        return
    fi
    for tool in memcheck racecheck; do
        timeout 290 compute-sanitizer --tool "$tool" --error-exitcode 1 --log-file "$out/gpu_sanitize_$tool.txt" \
            "$python" benchmarks/gpu_correct.py --small --out "$out"
    done
}

case $stage in
correct) run benchmarks/gpu_correct.py ;;
sanitize) sanitize ;;
ceilings) run benchmarks/gpu_ceilings.py ;;
ops) run benchmarks/gpu_ops.py ;;
peers) run benchmarks/gpu_ops.py --peers ;;
overlap) run benchmarks/gpu_overlap.py ;;
all)
    for each in correct sanitize ceilings ops peers overlap; do
        sh benchmarks/gpu_suite.sh "$each" "$out"
    done
    ;;
*)
    echo "unknown stage $stage: correct | sanitize | ceilings | ops | peers | overlap | all" >&2
    exit 2
    ;;
esac
