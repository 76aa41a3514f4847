// Masked Adam on AMD GPUs: formulas in numerics/adam.h, residual.h and dynamic8.h, one lane's part in adam_quad.h.
//
// Written for RDNA2 (wave32), right on any wave size. A workgroup owns whole rows (up to 32, fewer where that would
// leave units idle), one in every gridDim.x, since inactive rows are neighbours: an expert's. It lies along one of them
// at a time, four weights a lane, so that row addresses are scalar work and fp32 moves in 16-byte accesses that are
// contiguous over the wave; every load of a lane starts before the first is used. One lane a row computes the row's
// AdamScalars, since double precision is slow here, and alone reads and writes the row's step. A block's absmax is
// found among its 16 lanes; that of 256 moments of 8 bits among 64, two waves that meet in LDS. Bytes a weight: grad's
// 2 or 4, twice master's 2 or 4 or residual's 1, moments 16 or 4, codes 1 to 4.
#include <algorithm>

#include "gpu/masked_adam_launch.h"
#include "kernel_api.h"
#include "launch.h"
#include "numerics/adam_quad.h"
#include "pack.h"
#include "quad.h"

namespace usaf::gpu {
namespace {

constexpr int kLanesPerUnit = 2048;  // resident on a unit at once, at most: the registers of most variants allow half
// Of a workgroup. Rows are few, so that several workgroups follow each other on a unit and even out what differs; but
// with fewer, what each prepares (1 us) would show.
constexpr int kMinRows = 4, kMaxRows = 32;
constexpr int kGroupsInTurn = 4;
constexpr int kHalf = 32, kMaxHalves = kMaxThreads / kHalf, kBlockLanes = kBlockSize / kQuad;
static_assert(kMinThreads == kMomentBlock / kQuad);

// For every workgroup to copy to LDS.
__device__ constexpr Dynamic8Lookup<true> kExpAvgMap = kDynamic8SignedLookup;
__device__ constexpr Dynamic8Lookup<false> kExpAvgSqMap = kDynamic8UnsignedLookup;

struct Maps {
  Dynamic8Lookup<true> exp_avg;
  Dynamic8Lookup<false> exp_avg_sq;
  uint32_t largest[2][2][kMaxHalves];  // [turn][moment][half of 256 moments]: used in turns, a barrier a turn
};

struct RowStep {
  AdamScalars scalars;
  int32_t step;  // counting this one; 0: the row is skipped
};

// Four elements of one of two types, as loaded: uniform over the grid, known when it runs. Each type has registers of
// its own, and the bits stay as they are until they are used: else a load waits for those before it.
struct Either {
  Pack large, small;  // fp32; bf16 or moments of 8 bits

  template <bool kWide, int kSmallBytes>
  __device__ __forceinline__ static Either load(const uint8_t* row, int64_t col, bool is_large, int count) {
    Either four = {};
    if (is_large) four.large = load_four<kWide, 4>(row + col * 4, count);
    if (!is_large) four.small = load_four<kWide, kSmallBytes>(row + col * kSmallBytes, count);
    return four;
  }
};

__device__ __forceinline__ void unpack(const Either& four, bool f32, float (&value)[kQuad]) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const uint32_t pair = four.small.word[i / 2];
    value[i] = bits_float(f32 ? four.large.word[i] : i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  }
}

__device__ __forceinline__ Pack pack(const float (&value)[kQuad], bool f32) {
  Pack four = {};
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (f32) {
      four.word[i] = float_bits(value[i]);
    } else {
      four.word[i / 2] |= static_cast<uint32_t>(to_bf16(value[i]).bits) << i % 2 * 16;
    }
  }
  return four;
}

// The largest of kLanes <= 32 neighbouring lanes; every lane of the wave takes part.
template <int kLanes>
__device__ __forceinline__ uint32_t largest_of(uint32_t value) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    value = max(value, static_cast<uint32_t>(__shfl_xor(static_cast<int>(value), lane, kLanes)));
  }
  return value;
}

__device__ __forceinline__ uint32_t scale_bits(float scale) { return float_bits(scale); }
__device__ __forceinline__ uint32_t scale_bits(F16 scale) { return scale.bits; }

// Where a row's arrays begin: uniform over the workgroup.
template <Format kFormat, AdamMode kMode>
struct Row {
  const uint8_t* grad;
  uint8_t *master, *residual, *codes;
  typename ScaleOf<kFormat>::type* scales;
  uint8_t *exp_avg, *exp_avg_sq;
  float *exp_avg_absmax, *exp_avg_sq_absmax;  // null: the moment is fp32
  int64_t first_element;                      // in the noise

  __device__ __forceinline__ Row(const MaskedAdamArgs& a, int64_t row)
      : grad(static_cast<const uint8_t*>(a.grad) + row * a.cols * (a.grad_dtype == DType::f32 ? 4 : 2)),
        master(nullptr),
        residual(nullptr),
        codes(a.codes + row * code_bytes(kFormat, a.cols)),
        scales(static_cast<typename ScaleOf<kFormat>::type*>(a.absmax) + row * num_blocks(kFormat, a.cols)),
        exp_avg(static_cast<uint8_t*>(a.exp_avg) + row * a.cols * (a.exp_avg_absmax ? 1 : 4)),
        exp_avg_sq(static_cast<uint8_t*>(a.exp_avg_sq) + row * a.cols * (a.exp_avg_sq_absmax ? 1 : 4)),
        exp_avg_absmax(a.exp_avg_absmax + (a.exp_avg_absmax ? row * num_moment_blocks(a.cols) : 0)),
        exp_avg_sq_absmax(a.exp_avg_sq_absmax + (a.exp_avg_sq_absmax ? row * num_moment_blocks(a.cols) : 0)),
        first_element(a.first_element + row * a.cols) {
    if constexpr (kMode == AdamMode::master) {
      master = static_cast<uint8_t*>(a.master) + row * a.cols * (a.master_dtype == DType::f32 ? 4 : 2);
    }
    if constexpr (kMode == AdamMode::residual) residual = reinterpret_cast<uint8_t*>(a.residual) + row * a.cols;
  }
};

// A moment's four values as loaded, with its block's absmax if they are codes.
struct Moment {
  Either four;
  float absmax;

  template <bool kWide, bool kMoments8>
  __device__ __forceinline__ static Moment load(const uint8_t* row, const float* absmax, int64_t col, int count) {
    if constexpr (!kMoments8) return {{load_four<kWide, 4>(row + col * 4, count), {}}, 0.0f};
    return {Either::load<kWide, 1>(row, col, !absmax, count), absmax ? absmax[col / kMomentBlock] : 0.0f};
  }
  template <bool kMoments8>
  __device__ __forceinline__ void decode(bool is_codes, const float (&map)[256], float (&value)[kQuad]) const {
    if (kMoments8 && is_codes) {
      decode_moments_quad(map, four.small.word[0], absmax, value);
    } else {
      unpack(four, true, value);
    }
  }
};

// `largest`: of the 256 moments, where they become codes.
template <bool kWide, bool kMoments8, bool kSigned>
__device__ __forceinline__ void store_moment(uint8_t* row, float* absmax, const Dynamic8Lookup<kSigned>& map,
                                             const float (&value)[kQuad], uint32_t largest, int64_t col, int count) {
  if (kMoments8 && absmax) {
    const float scale = bits_float(largest);
    if (col % kMomentBlock == 0) absmax[col / kMomentBlock] = scale;
    store_four<kWide, 1>(row + col, {{encode_moments_quad(map, value, inverse_step(scale))}}, count);
  } else {
    store_four<kWide, 4>(row + col * 4, pack(value, true), count);
  }
}

// Steps and encodes the four weights at `col`; the moments stay in `quad`. Not 0 if a bit of codes, absmax, master or
// residual changed. Every lane of the workgroup takes part, also those past the row's end.
template <bool kWide, Format kFormat, AdamMode kMode, bool kMoments8>
__device__ __forceinline__ uint32_t step_weights(const MaskedAdamArgs& args, const Row<kFormat, kMode>& row,
                                                 const RowStep& row_step, const Nf4Tables& nf4, const Maps& maps,
                                                 float grad_scale, int64_t col, int count, AdamQuad& quad) {
  constexpr bool kHasMaster = kMode == AdamMode::master, kHasResidual = kMode == AdamMode::residual;
  const bool grad_f32 = args.grad_dtype == DType::f32, master_f32 = args.master_dtype == DType::f32;
  const int64_t code_at = col * code_bits(kFormat) / 8;
  Either grad = {};
  [[maybe_unused]] Either master = {};
  [[maybe_unused]] Pack residuals = {};
  Moment exp_avg = {}, exp_avg_sq = {};
  QuadCodes<kFormat> old_codes = 0;
  [[maybe_unused]] typename ScaleOf<kFormat>::type old_scale = {};
  if (count > 0) {
    grad = Either::load<kWide, 2>(row.grad, col, grad_f32, count);
    exp_avg = Moment::load<kWide, kMoments8>(row.exp_avg, row.exp_avg_absmax, col, count);
    exp_avg_sq = Moment::load<kWide, kMoments8>(row.exp_avg_sq, row.exp_avg_sq_absmax, col, count);
    if constexpr (kHasMaster) master = Either::load<kWide, 2>(row.master, col, master_f32, count);
    if constexpr (kHasResidual) residuals = load_four<kWide, 1>(row.residual + col, count);
    old_codes = load_codes<kFormat>(row.codes + code_at);
    if constexpr (kFormat != Format::bf16) old_scale = row.scales[col / kBlockSize];
  }

  float step = 1.0f, inverse = 1.0f, gradient[kQuad];
  if constexpr (kHasMaster) {
    unpack(master, master_f32, quad.weight);
  } else {
    if constexpr (kFormat != Format::bf16) step = BlockCodec<kFormat>::step(old_scale);
    decode_quad<kFormat, kMode>(old_codes, residuals.word[0], step, nf4, quad.weight);
  }
  exp_avg.decode<kMoments8>(row.exp_avg_absmax, maps.exp_avg.value, quad.exp_avg);
  exp_avg_sq.decode<kMoments8>(row.exp_avg_sq_absmax, maps.exp_avg_sq.value, quad.exp_avg_sq);
  unpack(grad, grad_f32, gradient);
  step_quad(row_step.scalars, grad_scale, gradient, count, quad);

  uint32_t difference = 0;
  if constexpr (kHasMaster) {
    const Pack rounded = pack(quad.weight, master_f32);
    unpack({rounded, rounded}, master_f32, quad.weight);  // the codes are a function of the master
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const uint32_t large = master.large.word[i], small = master.small.word[i];
      difference |= rounded.word[i] ^ (master_f32 ? large : small);
    }
    if (count > 0) {
      master_f32 ? store_four<kWide, 4>(row.master + col * 4, rounded, count)
                 : store_four<kWide, 2>(row.master + col * 2, rounded, count);
    }
  }
  if constexpr (kFormat != Format::bf16) {
    const float absmax = bits_float(largest_of<kBlockLanes>(quad_magnitude(quad.weight)));
    const auto scale = BlockCodec<kFormat>::make_scale(absmax);
    step = BlockCodec<kFormat>::step(scale);
    inverse = inverse_step(step);
    if (count > 0 && col % kBlockSize == 0) {
      difference |= scale_bits(scale) ^ scale_bits(old_scale);
      row.scales[col / kBlockSize] = scale;
    }
  }
  QuadCodes<kFormat> codes;
  if (!kHasMaster && !kHasResidual && args.stochastic) {
    const Random4 random = random_quad(args.seed, row_step.step, row.first_element + col);
    codes = encode_quad<kFormat>(quad.weight, inverse, &random, count, nf4);
  } else {
    codes = encode_quad<kFormat>(quad.weight, inverse, nullptr, count, nf4);
  }
  if (count > 0) {  // bytes past the row's end keep what they hold
    const QuadCodes<kFormat> flipped = (codes ^ old_codes) & quad_code_mask<kFormat>(count);
    difference |= static_cast<uint32_t>(flipped) | static_cast<uint32_t>(uint64_t{flipped} >> 32);
    store_codes<kFormat>(row.codes + code_at, old_codes ^ flipped);
  }
  if constexpr (kHasResidual) {
    const uint32_t kept = encode_residual_quad<kFormat>(quad.weight, codes, step, nf4);
    if (count > 0) {
      store_four<kWide, 1>(row.residual + col, {{kept}}, count);
      difference |= (kept ^ residuals.word[0]) << (32 - 8 * count);
    }
  }
  if constexpr (kMode == AdamMode::eco) carry_error_quad<kFormat>(row_step.scalars, codes, step, nf4, count, quad);
  return difference;
}

// The workgroup's r-th row. The same for every lane, but the compiler is not to find out how one row's addresses follow
// from another's: it would keep each of them in vector registers.
__device__ __forceinline__ int64_t row_of(int r) {
  const uint32_t row = blockIdx.x + static_cast<uint32_t>(r) * gridDim.x;
#if defined(__HIP_DEVICE_COMPILE__)
  return static_cast<uint32_t>(__builtin_amdgcn_readfirstlane(static_cast<int>(row)));
#else
  return row;
#endif
}

template <bool kWide, Format kFormat, AdamMode kMode, bool kMoments8>
__global__ void __launch_bounds__(kMaxThreads) masked_adam_kernel(MaskedAdamArgs args) {
  __shared__ RowStep row_steps[kMaxRows];
  __shared__ Nf4Tables nf4;
  __shared__ Maps maps;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (args.found_inf && *args.found_inf != 0.0f) return;
  if constexpr (is_nf4(kFormat)) copy_table(nf4, kNf4, thread, threads);
  if constexpr (kMoments8) {
    copy_table(maps.exp_avg, kExpAvgMap, thread, threads);
    copy_table(maps.exp_avg_sq, kExpAvgSqMap, thread, threads);
  }
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  const int64_t mine = blockIdx.x + int64_t{thread} * gridDim.x;
  if (thread < kMaxRows && mine < args.num_rows) {
    RowStep prepared = {};
    if (!args.active || args.active[mine]) {
      prepared.step = args.step[mine] + 1;
      prepared.scalars = adam_scalars(args.lr, args.beta1, args.beta2, args.eps, args.weight_decay, prepared.step);
      args.step[mine] = prepared.step;  // nothing but this lane reads it
    }
    row_steps[thread] = prepared;
  }
  __syncthreads();
  uint32_t difference = 0;
  int turn = 0;
  for (int r = 0;; ++r) {
    const int64_t at = row_of(r);
    if (at >= args.num_rows) break;
    if (row_steps[r].step == 0) continue;
    const Row<kFormat, kMode> row(args, at);
    for (int64_t start = 0; start < args.cols; start += int64_t{threads} * kQuad) {
      const int64_t col = start + thread * kQuad;
      const int count = quad_count(col, args.cols);
      AdamQuad quad;
      difference |= step_weights<kWide, kFormat, kMode, kMoments8>(args, row, row_steps[r], nf4, maps, grad_scale, col,
                                                                   count, quad);
      uint32_t largest[2] = {};
      if constexpr (kMoments8) {
        auto& halves = maps.largest[turn];
        turn ^= 1;
        const int half = thread / kHalf;
        halves[0][half] = largest_of<kHalf>(quad_magnitude(quad.exp_avg));
        halves[1][half] = largest_of<kHalf>(quad_magnitude(quad.exp_avg_sq));
        __syncthreads();
        for (int i = 0; i < 2; ++i) largest[i] = max(halves[i][half], halves[i][half ^ 1]);
      }
      if (count == 0) continue;
      store_moment<kWide, kMoments8>(row.exp_avg, row.exp_avg_absmax, maps.exp_avg, quad.exp_avg, largest[0], col,
                                     count);
      store_moment<kWide, kMoments8>(row.exp_avg_sq, row.exp_avg_sq_absmax, maps.exp_avg_sq, quad.exp_avg_sq,
                                     largest[1], col, count);
    }
  }
  if (args.changed && difference != 0) *args.changed = 1;
}

}  // namespace

void masked_adam(const MaskedAdamArgs& args, void* stream) {
  if (args.num_rows == 0) return;
  int threads = kMinThreads;
  while (threads < kMaxThreads && int64_t{threads} * kQuad < args.cols) threads *= 2;
  const int64_t resident = int64_t{multiprocessors()} * kLanesPerUnit / threads;
  const int64_t rows = std::clamp<int64_t>(args.num_rows / (kGroupsInTurn * resident), kMinRows, kMaxRows);
  const unsigned groups = adam_groups(args.num_rows, resident, rows, kMaxGridX);
  with_adam_kernel(args, [&]<Format kFormat, AdamMode kMode, bool kMoments8>() {
    with_wide(rows_are_aligned(args), [&]<bool kWide>() {
      launch("masked_adam", masked_adam_kernel<kWide, kFormat, kMode, kMoments8>, dim3(groups),
             dim3(static_cast<unsigned>(threads)), stream, args);
    });
  });
}

}  // namespace usaf::gpu
