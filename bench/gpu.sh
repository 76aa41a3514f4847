#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under ten minutes: build, self-test, tests, compute-sanitizer, the HIP
# sources on an NVIDIA GPU, benchmarks.
#
#     bench/gpu.sh OUT_DIR
#
# Builds offline against the torch that is installed, for this card alone. Writes OUT_DIR/gpu.md and gpu.json, and a log
# for each part. A part that fails or takes too long does not stop the next; the exit code is 1 if one did, 2 without a
# GPU. What the machine lacks of pytest, pybind11, cmake and ninja can lie in build/wheels, as wheels.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# -ne 1 ]; then
  echo "usage: bench/gpu.sh OUT_DIR" >&2
  exit 2
fi
PYTHON=${PYTHON:-python3}
ARCH=$("$PYTHON" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability()))) if torch.cuda.is_available() else None' 2>/dev/null)
if [ -z "$ARCH" ] || [ "$ARCH" = None ]; then
  echo "bench/gpu.sh: torch of $PYTHON finds no GPU" >&2
  exit 2
fi

OUT=$1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
: >"$OUT/parts.tsv"
END=$((SECONDS + 570))
status=0

if [ -d build/wheels ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps build/wheels/*.whl >"$OUT/wheels.log" 2>&1 || status=1
fi

# part NAME SECONDS COMMAND...: with its own limit, and never past the end of the whole.
part() {
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  if [ $((END - SECONDS)) -lt "$limit" ]; then limit=$((END - SECONDS)); fi
  if [ "$limit" -le 5 ]; then
    printf '%s\tleft out\t0\n' "$name" >>"$OUT/parts.tsv"
    status=1
    return 1
  fi
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  case $code in
    0) printf '%s\tpassed\t%d\n' "$name" $((SECONDS - begin)) ;;
    124 | 137) printf '%s\ttook over %d s\t%d\n' "$name" "$limit" $((SECONDS - begin)) ;;
    *) printf '%s\tfailed (exit code %d)\t%d\n' "$name" "$code" $((SECONDS - begin)) ;;
  esac >>"$OUT/parts.tsv"
  tail -n 1 "$OUT/parts.tsv"
  if [ "$code" -ne 0 ]; then status=1; fi
  return "$code"
}

package() { echo "$PWD/build/gpu/packages/$1"; }
tests=(tests/test_ops_*.py tests/test_row_importance.py tests/test_gpu_layer.py tests/test_gpu_package.py tests/test_cuda_graphs.py)
on_gpu="cuda or test_ops_devices or test_gpu_layer or test_gpu_package"
small=(tests/test_ops_devices.py)

# The HIP build on spare cores, meanwhile; waited for where it is needed.
"$PYTHON" tests/gpu_builds.py hip_on_cuda --architecture "$ARCH-real" >"$OUT/build_hip_on_cuda.log" 2>&1 &
hip_build=$!

if part build_cuda 200 "$PYTHON" tests/gpu_builds.py cuda --architecture "$ARCH-real"; then
  export PYTHONPATH="$(package cuda)"
  part self_check 60 "$PYTHON" -m usaf_ext.cli info --check
  part tests 150 "$PYTHON" -m pytest -k "$on_gpu" "${tests[@]}"
  part memcheck 50 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest "${small[@]}"
  part racecheck 50 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" -m pytest "${small[@]}"
fi
if wait "$hip_build"; then
  export PYTHONPATH="$(package hip_on_cuda)"
  part hip_self_check 40 "$PYTHON" -m usaf_ext.cli info --check
  part hip_tests 90 "$PYTHON" -m pytest -k "$on_gpu" "${tests[@]}"
else
  printf 'build_hip_on_cuda\tfailed\t0\n' >>"$OUT/parts.tsv"
  status=1
fi
export PYTHONPATH="$(package cuda)"
if [ $((END - SECONDS)) -gt 40 ]; then
  part benchmarks $((END - SECONDS)) "$PYTHON" bench/gpu_bench.py --out "$OUT" --seconds $((END - SECONDS - 30))
else
  part benchmarks 0 true
fi
"$PYTHON" bench/gpu_report.py "$OUT" || status=1
exit "$status"
