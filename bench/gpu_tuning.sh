#!/usr/bin/env bash
# What only a GPU can settle of the CUDA kernels' constants: how many blocks of a kernel a multiprocessor should hold
# (kBlocksPerSm of cuda/pack.h and of cuda/masked_adam.cu), and bank conflicts of the 8-bit moments' encoding.
#
#   bench/gpu_tuning.sh OUT_DIR
#
# Builds a copy of the sources for each pair of values, all at once, and measures the ops that they bear on: bench.json of
# each in OUT_DIR/blocks_*.json, and tuning.md beside them. Exit code: 0 all ran, 1 something did not, 2 no GPU.
set -uo pipefail

VARIANTS=("3 2" "2 1" "4 3") # pack.h, masked_adam.cu; first the ones that stand there
CASES='^(decode_nf4_bf16|encode_nf4_fp32|gather|scatter|adam_master_nf4|adam_master_nf4_8bit_moments|adam_eco_nf4)$'

export PATH=$PATH:/usr/local/cuda/bin
[ $# -eq 1 ] || { echo "gpu_tuning.sh: expected OUT_DIR" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
chip=$(python3 -c 'import torch
if torch.version.cuda and torch.cuda.is_available(): print("%d%d-real" % torch.cuda.get_device_capability())') || chip=
[ -n "$chip" ] || { echo "gpu_tuning.sh: no GPU: torch finds no NVIDIA GPU" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# set_constant FILE OLD NEW: the line must be there, or the constant has moved and the variants would be the same.
set_constant() {
  grep -q "constexpr int kBlocksPerSm = $2;" "$1" || { echo "gpu_tuning.sh: $1 has no kBlocksPerSm = $2" >&2; exit 1; }
  sed -i "s/constexpr int kBlocksPerSm = $2;/constexpr int kBlocksPerSm = $3;/" "$1"
}

builds=()
read -r standing_pack standing_adam <<<"${VARIANTS[0]}"
for variant in "${VARIANTS[@]}"; do
  read -r pack adam <<<"$variant"
  tree=$work/blocks_${pack}_$adam
  mkdir "$tree"
  cp -r CMakeLists.txt cpp cuda hip python tests bench "$tree"
  set_constant "$tree/cuda/pack.h" "$standing_pack" "$pack"
  set_constant "$tree/cuda/masked_adam.cu" "$standing_adam" "$adam"
  python3 "$tree/tests/gpu_builds.py" cuda --architecture "$chip" >"$tree/build.log" 2>&1 &
  builds+=($!)
done
for build in "${builds[@]}"; do wait "$build" || failed=1; done

for variant in "${VARIANTS[@]}"; do
  name=blocks_${variant/ /_}
  site=$work/$name/build/gpu/packages/cuda
  mkdir "$work/$name/result"
  if PYTHONPATH=$site timeout 110 python3 "$work/$name/bench/gpu_bench.py" --out "$work/$name/result" --only "$CASES" \
    --seconds 90 >"$work/$name/bench.log" 2>&1; then
    cp "$work/$name/result/bench.json" "$out/$name.json"
  else
    tail -n 20 "$work/$name/build.log" "$work/$name/bench.log" >&2
    failed=1
  fi
done
if command -v ncu >/dev/null; then
  metrics=l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum,l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum
  metrics+=,l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,gpu__time_duration.sum
  PYTHONPATH=$work/blocks_${VARIANTS[0]/ /_}/build/gpu/packages/cuda timeout 100 ncu --clock-control none --csv \
    --kernel-name regex:adam --launch-count 3 --metrics "$metrics" python3 bench/gpu_measure.py --out "$work" --size bench \
    --only '^adam_master_nf4_8bit_moments$' --rounds 1 >"$out/bank_conflicts.csv" 2>&1 || failed=1
fi

python3 - "$out" <<'PYTHON' | tee "$out/tuning.md"
import json, pathlib, sys

runs = {path.stem: json.loads(path.read_text()) for path in sorted(pathlib.Path(sys.argv[1]).glob("blocks_*.json"))}
times = {name: {row["case"]: row for row in run["rows"] if "peer" not in row} for name, run in runs.items()}
print("Milliseconds (% of a copy), by blocks a multiprocessor: pack.h, masked_adam.cu\n")
print("| case | " + " | ".join(times) + " |\n|---" + "|---:" * len(times) + "|")
for case in dict.fromkeys(case for rows in times.values() for case in rows):
    cells = (rows.get(case) for rows in times.values())
    print(f"| {case} | " + " | ".join(f"{c['median_ms']:.4f} ({c['percent_of_copy']:.0f}%)" if c else "" for c in cells) + " |")
PYTHON
exit $failed
