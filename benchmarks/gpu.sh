#!/usr/bin/env bash
# On a machine with a GPU, without a network: install the prebuilt wheel, test it on the device, look for bad memory
# accesses and races, measure, print a short table. Ends within eight minutes whatever happens, with 1 if a step failed.
#
#   benchmarks/gpu.sh [WHEEL]        the newest of dist/*.whl if none is named
#
# Build the wheel on any machine with nvcc: `make wheel`. Results are left in
# benchmarks/results/<device>.json and, with the logs, under $OUT (default: build/gpu).
set -uo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
OUT=$(realpath -m "${OUT:-$ROOT/build/gpu}")
WHEEL=$(realpath "${1:-$(ls -t "$ROOT"/dist/inflection_fast-*.whl | head -n 1)}") || exit 1
PYTHON=$(command -v "${PYTHON:-python3}") || exit 1
[[ $PYTHON = /* ]] || PYTHON=$PWD/$PYTHON  # no realpath: a virtual environment is known by its link
KERNEL_TESTS=$(cd "$ROOT" && grep -l 'mark\.kernel' tests/test_*.py)
CHECKED="tests/test_attention_stats_qk.py tests/test_cka_16bit.py"  # by the sanitizer, of these:
HOPPER=tests/test_attention_stats_qk_hopper.py  # by memcheck too: what racecheck makes of bulk copies nobody has seen yet
SMALL="poison or empty or keyless or typical-torch.float32 or rows_together or (fills and 129)"
mkdir -p "$OUT"

# A copy without the package's sources, so that the installed wheel is what is imported.
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cp -r "$ROOT/tests" "$ROOT/benchmarks" "$ROOT/pyproject.toml" "$WORK"
cp "$(dirname "$WHEEL")/commit.txt" "$WORK/benchmarks/commit.txt"  # of the sources that the wheel was built from
cd "$WORK" || exit 1
# For `-p on_cuda`: as `tests.on_cuda` it would be looked for in any package "tests" that is installed.
export PYTHONPATH=$WORK/tests${PYTHONPATH:+:$PYTHONPATH}

# The limits of all steps but the last add up to 320 s; the last one gets what is left, at least 150.
DEADLINE=$((SECONDS + 470))
step() {  # name, seconds, command...: a line with the outcome; the output goes to a log
  local name=$1 limit=$2 start=$SECONDS left=$((DEADLINE - SECONDS)) code
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -gt 5 ]; then
    timeout --kill-after=3 $((limit - 3)) "$@" > "$OUT/$name.log" 2>&1
    code=$?
  else
    echo "Error: no time left" > "$OUT/$name.log"
    code=124
  fi
  printf '%-12s %4ds  %s  %s\n' "$name" $((SECONDS - start)) "$([ $code = 0 ] && echo ok || echo "FAILED ($code)")" \
    "$(grep -E 'passed|failed|ERROR SUMMARY|RACECHECK SUMMARY|Error' "$OUT/$name.log" | tail -n 1 | cut -c1-120)" \
    | tee -a "$OUT/summary.txt"
  [ $code = 0 ] && return
  FAILED=1
  { grep -E '^(FAILED|ERROR)' "$OUT/$name.log" || tail -n 3 "$OUT/$name.log"; } | head -n 8 | cut -c1-160
  return $code
}
FAILED=0
: > "$OUT/summary.txt"

LOAD='import torch, inflection_fast; info = inflection_fast.build_info(); print(torch.__version__, info)
assert info["cuda"], "no CUDA library was loaded"'
step install 60 bash -c '"$0" -m pip install --quiet --no-index --no-deps --force-reinstall "$1" && "$0" -c "$2"' \
  "$PYTHON" "$WHEEL" "$LOAD" || exit 1
step kernels 110 "$PYTHON" -m pytest -p on_cuda $KERNEL_TESTS --tb=short -v
step device 70 "$PYTHON" -m pytest tests/test_cuda.py tests/test_monitor_cuda.py --tb=short -v
# Our kernels only, and every tensor an allocation of its own: within a block of torch's cache nothing is out of bounds.
# Errors of the CUDA API are not reported: torch expects some of its own, and ours raise.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
  [ "$tool" = memcheck ] && files="$CHECKED $HOPPER" || files=$CHECKED
  step "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 --kernel-name kns=inflection \
    --report-api-errors no "$PYTHON" -m pytest -p on_cuda $files -k "$SMALL" --tb=short -v -x
done
unset PYTORCH_NO_CUDA_MEMORY_CACHING
step benchmarks 470 \
  "$PYTHON" -m pytest benchmarks/bench_cuda.py benchmarks/bench_overhead.py -k "cuda or 1B" -s --tb=short -v
for file in benchmarks/results/*.json; do
  cmp -s "$file" "$ROOT/$file" && continue  # not measured here
  cp "$file" "$ROOT/benchmarks/results/" && cp "$file" "$OUT/"
done
echo "---- $(timeout 5 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)"
cat "$OUT/summary.txt"
grep -hE '^[a-zA-Z].* ms; ' "$OUT/benchmarks.log"
exit $FAILED
