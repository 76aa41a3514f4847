#!/usr/bin/env bash
# All that takes an NVIDIA GPU, offline, in under ten minutes: build, tests, sanitizers, hip/ through nvcc, benchmarks.
#
#   bench/gpu.sh OUT_DIR [WHEELS_DIR]
#
# WHEELS_DIR: wheels of what this Python lacks (the tests' oracles want bitsandbytes), used for this run alone.
# It builds against the torch that is installed, for this card's chip, and installs nothing. Parts run in order of value,
# each with a time limit of its own; one that fails does not stop the next. OUT_DIR/gpu.json, gpu.md and gpu.log are
# written after each part, so that whatever ends this script leaves what was found.
# Exit code: 0 all parts passed, 1 some did not (or did not fit in), 2 nothing could be started.
set -uo pipefail
set -m # each part is a process group, that nothing of it outlives it

TOTAL_SECONDS=560

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
export PATH=$PATH:/usr/local/cuda/bin
command -v python3 >/dev/null || stop "no python3"
python3 -c 'import torch' 2>/dev/null || stop "python3 has no torch"
chip=$(python3 -c 'import torch
if torch.version.cuda and torch.cuda.is_available(): print("%d%d-real" % torch.cuda.get_device_capability())')
[ -n "$chip" ] || stop "no GPU: this torch finds no NVIDIA GPU"
command -v nvcc >/dev/null || stop "no nvcc on PATH"

work=$(mktemp -d)
name='' running='' hip_build='' begin=0
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1

# note STATUS: how the part went, in the report.
note() {
  printf '%s\t%s\t%s\t%s\n' "$name" "$1" $((SECONDS - begin)) "$(grep -v '^\s*$' "$work/$name.log" 2>/dev/null |
    tail -n 1 | tr '\t\r' '  ' | cut -c 1-200)" >>"$work/parts.tsv"
  name=''
  timeout 20 python3 bench/gpu_report.py "$work" "$out" >/dev/null 2>&1
}

finish() {
  for group in $running $hip_build; do kill -KILL -- "-$group" 2>/dev/null; done
  [ -z "$name" ] || note interrupted
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 143' HUP INT TERM

# part NAME SECONDS COMMAND...: run it, and note how it went. Out of time, it gets an interrupt and 14 s: pytest then says
# what failed, once xdist has given its workers 10 s.
part() {
  local limit=$2 left=$((TOTAL_SECONDS - SECONDS)) code=0
  name=$1 begin=$SECONDS
  shift 2
  if [ "$left" -lt 10 ]; then
    note "left out"
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "gpu.sh: $name (at most $limit s)"
  USAF_FAILURES=$work/$name.failures.log timeout --foreground -s INT -k 14 "$limit" "$@" \
    >"$work/$name.log" 2>&1 </dev/null &
  running=$!
  wait "$running" || code=$?
  kill -KILL -- "-$running" 2>/dev/null
  running=''
  case $code in
    0) note passed ;;
    124 | 137) note "out of time" ;;
    *) note failed ;;
  esac
}

oracles() {
  python3 -c 'import bitsandbytes, psutil, pytest_benchmark' && return
  echo "most of the tests cannot be collected: put the wheel that is missing into WHEELS_DIR"
  return 1
}
build() {
  python3 -m pip install --no-build-isolation --no-deps --no-index --upgrade --target "$work/site" . \
    -C cmake.define.USAF_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$chip" && return
  echo "pip cannot build it; once more with cmake alone"
  rm -rf "$work/site"
  python3 tests/gpu_builds.py cuda --architecture "$chip" && ln -s "$PWD/build/gpu/packages/cuda" "$work/site"
}
hip_tests() {
  # shellcheck disable=SC2016
  timeout 80 bash -c 'while kill -0 "$0" 2>/dev/null; do sleep 0.5; done' "$hip_build"
  cat "$work/hip_build.log"
  export PYTHONPATH="$PWD/build/gpu/packages/hip_on_cuda:$packages" OMP_NUM_THREADS=1
  python3 -c 'from usaf_ext import _C; assert _C.GPU_BACKEND == "hip", _C.GPU_BACKEND' || return 1
  python3 -m usaf_ext.cli info --check || return 1
  exec python3 -m pytest tests/test_gpu_layer.py tests/test_ops_*.py tests/test_row_importance.py
}
# sanitize TOOL: our kernels alone, which lie in namespace usaf; all, where this version does not know the filter.
sanitize() {
  local code=0
  local options=(--tool "$1" --target-processes all --report-api-errors no --print-limit 20 --error-exitcode 9)
  local check=(python3 -m usaf_ext.cli info --check)
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  compute-sanitizer "${options[@]}" --kernel-name kernel_substring=usaf "${check[@]}" || code=$?
  grep -q "checks against" "$work/$1.log" && return "$code"
  echo "the check did not run to its end; once more, without the filter by kernel"
  compute-sanitizer "${options[@]}" "${check[@]}"
}
export -f oracles build hip_tests sanitize
export work chip

export packages=$work/wheels
if [ -n "$wheels" ]; then
  part wheels 60 python3 -m pip install --no-deps --no-compile --upgrade --target "$packages" "$wheels"/*.whl
fi
export PYTHONPATH="$packages"
# A build of its own folder, beside everything else.
python3 tests/gpu_builds.py hip_on_cuda --architecture "$chip" >"$work/hip_build.log" 2>&1 </dev/null &
export hip_build=$!
part oracles 60 bash -c oracles
part build 270 bash -c build
export PYTHONPATH="$work/site:$packages"
PYTEST_ADDOPTS="-m gpu --tb=short --continue-on-collection-errors"
python3 -c 'import xdist' 2>/dev/null && PYTEST_ADDOPTS+=" -n 8"
python3 -c 'import pytest_timeout' 2>/dev/null && PYTEST_ADDOPTS+=" --timeout=45 --timeout-method=thread"
export PYTEST_ADDOPTS
# shellcheck disable=SC2207
tests=(tests/test_{gpu_layer,gpu_package,gpu_training,cuda_graphs,ops_devices}.py
  $(grep -l 'usefixtures(.*"device"' tests/test_*.py))

part self_check 60 python3 -m usaf_ext.cli info --check
part gpu_tests 140 env OMP_NUM_THREADS=1 python3 -m pytest "${tests[@]}"
part benchmarks 170 python3 bench/gpu_bench.py --out "$work" --seconds 140
part hip_on_cuda 90 bash -c hip_tests
part memcheck 70 bash -c 'sanitize memcheck'
part racecheck 70 bash -c 'sanitize racecheck'

python3 bench/gpu_report.py "$work" "$out"
