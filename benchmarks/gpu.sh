#!/usr/bin/env bash
# On a machine with a CUDA GPU, in under nine minutes: is the engine triton right, how fast is it, and where does its
# time go. Rows, tables and logs are left in the folder $OUT.
#
#   OUT=results PYTHON=python3 bash benchmarks/gpu.sh
#
# Correctness comes first, and nothing is timed of a size that is wrong. Kernels are compiled on first use, which takes
# longer than running them: sizes are checked side by side, and what follows finds the kernels in triton's cache.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?set OUT to the folder for the results}"
PYTHON="${PYTHON:-python3}"
SIZES="${SIZES:-64:8 128:8 256:8 512:10 60:4 512:32}"
TOKENS="${TOKENS:-65536}"
export PYTHONPATH="$PWD:$PWD/compilers${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"

"$PYTHON" - > "$OUT/machine.txt" 2>&1 <<'PY'
import torch, triton
print("torch", torch.__version__, "triton", triton.__version__)
print(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0))
PY
status=$?
cat "$OUT/machine.txt"
if [ "$status" -ne 0 ]; then
    echo "no GPU, or no triton: nothing was run" >&2
    exit 2
fi

failed=0
note() { # note STATUS WHAT
    if [ "$1" -ne 0 ]; then
        failed=1
        echo "FAILED ($1): $2"
    fi
}

echo "== right, compared with the naive engine (compiling) =="
jobs=()
for size in $SIZES; do
    timeout 240 "$PYTHON" -m benchmarks.triton_check --sizes "$size" --tokens 2048 \
        --out "$OUT/check-${size/:/-}.jsonl" > "$OUT/check-${size/:/-}.log" 2>&1 &
    jobs+=("$!:$size")
done
right=()
for job in "${jobs[@]}"; do
    size="${job#*:}"
    if wait "${job%%:*}"; then
        right+=("$size")
    else
        note 1 "check of $size"
    fi
    tail -n 3 "$OUT/check-${size/:/-}.log"
done
if [ "${#right[@]}" -eq 0 ]; then
    echo "no size is right: nothing was timed"
    exit 1
fi
listed="$(IFS=,; echo "${right[*]}")"

echo "== the kernels, timed and profiled =="
timeout 90 "$PYTHON" -m benchmarks.triton_check --sizes "$listed" --tokens "$TOKENS" \
    --out "$OUT/cuda-kernels.jsonl" --profile "$OUT/profiles" 2>&1 | tee "$OUT/kernels.log"
note "${PIPESTATUS[0]}" "timing of the kernels"

echo "== a routing step, against softmax + topk and the engine torch =="
for size in "${right[@]}"; do
    timeout 60 "$PYTHON" -m benchmarks --op subset --device cuda --tokens "$TOKENS" --sizes "$size" --repeats 10 \
        --providers topk,circuitroute:triton,circuitroute:torch --out "$OUT/cuda-subset.jsonl" 2>&1 |
        tee -a "$OUT/subset.log"
    note "${PIPESTATUS[0]}" "timing of $size"
    # Two sizes are enough if the machine is slow: stop in time.
    if [ "$SECONDS" -gt 400 ]; then
        echo "stopping after $SECONDS s"
        break
    fi
done

echo "== done after $SECONDS s; results in $OUT =="
ls -l "$OUT"
exit "$failed"
