#!/usr/bin/env bash
# All that takes an NVIDIA GPU, offline, in under ten minutes: build, tests, sanitizers, hip/ through nvcc, benchmarks.
#
#   bench/gpu.sh OUT_DIR [WHEELS_DIR]
#
# WHEELS_DIR: wheels of what this Python lacks (the tests' oracles want bitsandbytes), used for this run alone.
# It builds against the torch that is installed, for this card's chip, and installs nothing. Parts run in order of value,
# each with a time limit of its own; one that fails does not stop the next. Writes OUT_DIR/gpu.json, gpu.md, gpu.log.
# Exit code: 0 all parts passed, 1 some did not (or did not fit in), 2 nothing could be started.
set -uo pipefail

TOTAL_SECONDS=575

stop() {
  echo "gpu.sh: $1" >&2
  exit 2
}

[ $# -eq 1 ] || [ $# -eq 2 ] || stop "expected OUT_DIR [WHEELS_DIR]"
mkdir -p "$1" || stop "cannot make $1"
out=$(cd "$1" && pwd)
wheels=
if [ $# -eq 2 ]; then
  [ -d "$2" ] || stop "no folder $2"
  wheels=$(cd "$2" && pwd)
fi
cd "$(dirname "$0")/.." || stop "cannot enter the repository"
command -v python3 >/dev/null || stop "no python3"
python3 -c 'import torch' 2>/dev/null || stop "python3 has no torch"
chip=$(python3 -c 'import torch
if torch.version.cuda and torch.cuda.is_available(): print("%d%d-real" % torch.cuda.get_device_capability())')
[ -n "$chip" ] || stop "no GPU: this torch finds no NVIDIA GPU"
command -v nvcc >/dev/null || stop "no nvcc on PATH"

work=$(mktemp -d)
hip_build=
trap '[ -z "$hip_build" ] || kill -- "-$hip_build" 2>/dev/null; rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1

# part NAME SECONDS COMMAND...: run it, and note how it went.
part() {
  local name=$1 limit=$2 left=$((TOTAL_SECONDS - SECONDS)) begin=$SECONDS code=0 status
  shift 2
  if [ "$left" -lt 10 ]; then
    printf '%s\t%s\t%s\t%s\n' "$name" "left out" 0 "no time left" >>"$work/parts.tsv"
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "gpu.sh: $name (at most $limit s)"
  timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1 || code=$?
  case $code in
    0) status=passed ;;
    124 | 137) status="out of time" ;;
    *) status=failed ;;
  esac
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - begin)) "$(grep -v '^\s*$' "$work/$name.log" | tail -n 1 |
    tr '\t' ' ' | cut -c 1-200)" >>"$work/parts.tsv"
}

build() {
  if python3 -c 'import scikit_build_core, pybind11' 2>/dev/null; then
    python3 -m pip install --no-build-isolation --no-deps --no-index --upgrade --target "$work/site" . \
      -C cmake.define.USAF_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$chip"
  else
    python3 tests/gpu_builds.py cuda --architecture "$chip" && ln -s "$PWD/build/gpu/packages/cuda" "$work/site"
  fi
}
hip_tests() {
  # shellcheck disable=SC2016
  timeout 80 bash -c 'while kill -0 "$0" 2>/dev/null; do sleep 0.5; done' "$hip_build"
  cat "$work/hip_build.log"
  export PYTHONPATH="$PWD/build/gpu/packages/hip_on_cuda:$packages"
  python3 -c 'from usaf_ext import _C; assert _C.GPU_BACKEND == "hip", _C.GPU_BACKEND' || return 1
  python3 -m usaf_ext.cli info --check || return 1
  python3 -m pytest "${parallel[@]}" -m gpu tests/test_ops_*.py tests/test_row_importance.py tests/test_gpu_layer.py
}
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 python3 -m usaf_ext.cli info --check
}
export -f build hip_tests sanitize
export work chip

packages=$work/wheels
if [ -n "$wheels" ]; then
  part wheels 60 python3 -m pip install --no-deps --no-compile --upgrade --target "$packages" "$wheels"/*.whl
fi
export packages PYTHONPATH="$packages"
# A build of its own folder, beside everything else.
setsid python3 tests/gpu_builds.py hip_on_cuda --architecture "$chip" >"$work/hip_build.log" 2>&1 &
hip_build=$!
part build 270 bash -c build
export PYTHONPATH="$work/site:$packages" hip_build
parallel=()
python3 -c 'import xdist' 2>/dev/null && parallel=(-n 6)

part self_check 60 python3 -m usaf_ext.cli info --check
part gpu_tests 140 python3 -m pytest "${parallel[@]}" -m gpu tests
part benchmarks 170 python3 bench/gpu_bench.py --out "$work" --seconds 140
# Arrays are not exported: the function takes its own.
part hip_on_cuda 90 bash -c "parallel=(${parallel[*]}); hip_tests"
part memcheck 70 bash -c 'sanitize memcheck'
part racecheck 70 bash -c 'sanitize racecheck'

python3 bench/gpu_report.py "$work" "$out"
