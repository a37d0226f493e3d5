#!/bin/sh
# The first hour on one GPU: three commands of at most ten minutes, no network. docs/gpu.md lists what each proves.
#
#   sh benchmarks/gpu_suite.sh gpu-1|gpu-2|gpu-3|STAGE [OUT]
#
# Every stage is a process of its own under a limit of its own, in seconds:
#   gpu-1   products 55, streams 25, snapshot 25, packed 70, inplace 125 (gpu_probe.py), train 240 (gpu_train.py)    540
#   gpu-2   correct 230, memcheck 110, racecheck 70, overlap 60                                                     470
#   gpu-3   ceilings 150, ops 250, peers 180                                                                        580
# A stage that fails or does not end leaves the rows it wrote, the next one runs, and the group ends with a table of
# stages, verdicts and seconds (also in OUT/GROUP.txt) and with 1 unless all are ok. CSV files go to OUT (default
# benchmarks/results). Environment: PYTHON, the interpreter (default: python3, else python); ARGS=--cpu, reduced shapes
# on the CPU, to test the control flow; RUNS, names of training runs (default: all of gpu_train.py --list);
# KDTRAIN_COMMIT, the commit of files that were copied without git. train needs deepspeed (gpu_train.py --wheels prints
# how to install it); peers are used where they are installed, and absent in the CSV where not.
set -u
cd "$(dirname -- "$0")/.." || exit 2
gpu_1="products streams snapshot packed inplace train"
gpu_2="correct memcheck racecheck overlap"
gpu_3="ceilings ops peers"
usage="gpu-1, gpu-2, gpu-3, or one stage of $gpu_1 $gpu_2 $gpu_3"
group=${1:?"need $usage"}
out=${2:-benchmarks/results}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    command -v python3 >/dev/null || PYTHON=python
fi
export PYTHON PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

case " gpu-1 gpu-2 gpu-3 $gpu_1 $gpu_2 $gpu_3 " in
*" $group "*) ;;
*)
    echo "unknown stage $group; need $usage" >&2
    exit 2
    ;;
esac
case $group in
gpu-1) stages=$gpu_1 ;;
gpu-2) stages=$gpu_2 ;;
gpu-3) stages=$gpu_3 ;;
*) stages=$group ;;
esac
mkdir -p "$out" || exit 2

script() { # SECONDS SCRIPT WORD...
    limit=$1 name=$2
    shift 2
    # shellcheck disable=SC2086
    timeout -k 10 "$limit" "$PYTHON" "benchmarks/$name.py" "$@" --out "$out" ${ARGS:-}
}

sanitizer() { # SECONDS TOOL: without the caching allocator, or reads past a tensor stay inside the allocator's block
    case " ${ARGS:-} " in
    *" --cpu "*)
        script "$1" gpu_correct --small # compute-sanitizer sees nothing on a CPU
        return
        ;;
    esac
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer: absent"
        return 3
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 "$1" compute-sanitizer --tool "$2" --error-exitcode 1 \
        --log-file "$out/gpu_$2.txt" "$PYTHON" benchmarks/gpu_correct.py --small --out "$out"
}

stage() {
    case $1 in
    products) script 55 gpu_probe products ;;
    streams) script 25 gpu_probe streams ;;
    snapshot) script 25 gpu_probe snapshot ;;
    packed) script 70 gpu_probe packed ;;
    inplace) script 125 gpu_probe inplace ;;
    # shellcheck disable=SC2086
    train) script 240 gpu_train ${RUNS:-} ;;
    correct) script 230 gpu_correct ;;
    memcheck) sanitizer 110 memcheck ;;
    racecheck) sanitizer 70 racecheck ;; # of shared memory only
    overlap) script 60 gpu_overlap ;;
    ceilings) script 150 gpu_ceilings ;;
    ops) script 250 gpu_ops ;;
    peers) script 180 gpu_ops --peers ;;
    esac
}

echo "PYTHON=$PYTHON ARGS=${ARGS:-}"
nvidia-smi -L 2>/dev/null || echo "nvidia-smi: absent"
for tool in git gcc compute-sanitizer; do
    command -v "$tool" || echo "$tool: absent"
done

table="$out/$group.txt"
printf '%-10s %-10s %s\n' stage verdict seconds >"$table"
failed=0
for each in $stages; do
    echo "== $each"
    began=$(date +%s)
    stage "$each"
    code=$?
    case $code in
    0) verdict=ok ;;
    3) verdict=absent ;;
    124 | 137) verdict=timeout ;;
    *) verdict="FAIL($code)" ;;
    esac
    [ "$code" = 0 ] || failed=1
    printf '%-10s %-10s %s\n' "$each" "$verdict" "$(($(date +%s) - began))" >>"$table"
done
cat "$table"
exit $failed
