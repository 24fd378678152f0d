#!/usr/bin/env bash
# The first minutes on a GPU: is the engine triton right, how fast is it, where does its time go. In under nine minutes.
#
#   OUT=results bash benchmarks/gpu.sh
#
# Right comes first: small and ragged shapes, then those that are timed. A size that was found wrong is not timed. Every
# part is a process under its own limit, and appends to $OUT as it finds: one that dies takes nothing else with it.
# rows.jsonl, summary.txt, log.txt, profile.txt, memcheck.txt. Kernels that were compiled beforehand are taken from the
# folder $PREWARMED (python -m benchmarks.stub_cuda.prewarm). DEVICE=cpu goes through all of it under the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?set OUT to the folder for the results}"
mkdir -p "$OUT"; OUT="$(cd "$OUT" && pwd)"
export OUT DEVICE="${DEVICE:-cuda}" PYTHON="${PYTHON:-python3}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export PYTHONPATH="$PWD:$PWD/compilers${PYTHONPATH:+:$PYTHONPATH}"
if [ "$DEVICE" = cuda ]; then unset TRITON_INTERPRET; else export TRITON_INTERPRET=1; fi
SMOKE="${SMOKE:-6:2:1 6:2:31 6:2:33 1:1:33 3:3:31 33:5:65 21:17:1 21:17:33 65:20:5 evidence memory lost doubt}"
SIZES="${SIZES:-64:8 128:8 256:8 512:10 64:4-8}"
WIDE="${WIDE:-$SIZES 60:4 255:3 512:32 513:5 1024:64 128:1 16:16}"
JOBS="${JOBS:-13}"

temporary="$(mktemp -d)"
trap 'rm -rf "$temporary"' EXIT
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$temporary}"
if [ -d "${PREWARMED:-}" ]; then # the files of a kernel name each other by their full paths
    cp -r "$PREWARMED/." "$TRITON_CACHE_DIR"
    sed -i -E "s#\"[^\"]*/([^/\"]+/[^/\"]+)\"#\"$TRITON_CACHE_DIR/\1\"#g" "$TRITON_CACHE_DIR"/*/__grp__*.json
fi

part() { # part LIMIT PART WHAT
    timeout -k 5 "$1" "$PYTHON" -m benchmarks.triton_check "$2" "$3" --device "$DEVICE" --out "$OUT" >> "$OUT/log.txt" 2>&1
    local status=$?
    [ "$status" -eq 0 ] || echo "$2 $3 ended with $status" >> "$OUT/summary.txt"
    return "$status"
}
export -f part
side_by_side() { # side_by_side LIMIT PART WHAT...
    local limit="$1" name="$2"; shift 2
    printf '%s\n' "$@" | xargs -P "$JOBS" -I{} bash -c "part $limit $name {}" || failed=1
}

failed=0
part 60 machine - || { tail -n 5 "$OUT/log.txt"; echo "no GPU, or no triton: nothing was run" >&2; exit 2; }
echo "== small and ragged, at $SECONDS s"; side_by_side 90 smoke $SMOKE
echo "== wider, at $SECONDS s"; side_by_side 120 wide $WIDE
echo "== times, at $SECONDS s"
for size in $SIZES; do
    [ "$SECONDS" -gt 380 ] && { echo "no time for $size" >> "$OUT/summary.txt"; continue; }
    part 45 time "$size" || failed=1
done
echo "== where the time goes, at $SECONDS s"
part 40 profile "${SIZES%% *}" || failed=1
if [ "$DEVICE" = cuda ] && [ "$SECONDS" -lt 470 ] && command -v compute-sanitizer > /dev/null; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 60 compute-sanitizer --tool memcheck --print-limit 5 --error-exitcode 1 \
        "$PYTHON" -m benchmarks.triton_check smoke memory --out "$OUT" > "$OUT/memcheck.txt" 2>&1 || failed=1
    tail -n 2 "$OUT/memcheck.txt" >> "$OUT/summary.txt"
fi
echo "== done after $SECONDS s"
cat "$OUT/summary.txt"
exit "$failed"
