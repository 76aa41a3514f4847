// Masked Adam on NVIDIA GPUs: formulas in numerics/adam.h, residual.h and dynamic8.h, one lane's part in adam_quad.h.
//
// A warp steps 256 weights of a row at a time: four blocks of weights, and one block of 8-bit moments, so that every
// absmax is found with shuffles. Each lane holds four weights of the first half and four of the second: fp32 moves in
// 16-byte accesses that are contiguous over the warp, and the loads of both halves start before the first is used.
// A thread block owns whole rows (up to 32, fewer where that would leave multiprocessors idle): one lane a row computes
// the row's AdamScalars, since double precision is slow here, and alone reads and writes the row's step.
// Bytes a weight: grad's 2 or 4, twice master's 2 or 4 or residual's 1, moments 16 or 4, codes 1 to 4.
#include "gpu/masked_adam_launch.h"
#include "kernel_api.h"
#include "launch.h"
#include "numerics/adam_quad.h"
#include "quad.h"

namespace usaf::gpu {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
constexpr int kBlocksPerSm = 2;
constexpr int kMaxRows = kWarp;  // of a thread block
constexpr int64_t kMaxGridX = 2147483647;
constexpr int kHalf = kWarp * kQuad, kHalves = 2, kBlockLanes = kBlockSize / kQuad;
constexpr unsigned kFullWarp = 0xffffffffu;
static_assert(kHalf * kHalves == kMomentBlock);

// On the device, for every thread block to copy to its shared memory.
__device__ constexpr Dynamic8Lookup<true> kExpAvgMap = kDynamic8SignedLookup;
__device__ constexpr Dynamic8Lookup<false> kExpAvgSqMap = kDynamic8UnsignedLookup;

struct RowStep {
  AdamScalars scalars;
  int32_t step;  // counting this one; 0: the row is skipped
};

struct Shared {
  RowStep row[kMaxRows];
  Nf4Tables nf4;
};

struct SharedMaps {
  Dynamic8Lookup<true> exp_avg;
  Dynamic8Lookup<false> exp_avg_sq;
};

// fp32 or bf16, as their bits until they are unpacked: which of them is known at run time only.
__device__ __forceinline__ uint4 load_floats(const void* data, int64_t element, DType dtype, int count, bool wide) {
  return dtype == DType::f32 ? load_four<4>(at(data, element, 4), count, wide)
                             : load_four<2>(at(data, element, 2), count, wide);
}

__device__ __forceinline__ void unpack(uint4 words, DType dtype, float (&value)[kQuad]) {
  const bool f32 = dtype == DType::f32;
  value[0] = bits_float(f32 ? words.x : words.x << 16);
  value[1] = bits_float(f32 ? words.y : words.x & 0xffff0000u);
  value[2] = bits_float(f32 ? words.z : words.y << 16);
  value[3] = bits_float(f32 ? words.w : words.y & 0xffff0000u);
}

__device__ __forceinline__ uint4 pack(const float (&value)[kQuad]) {
  return make_uint4(float_bits(value[0]), float_bits(value[1]), float_bits(value[2]), float_bits(value[3]));
}

__device__ __forceinline__ uint32_t scale_bits(float scale) { return float_bits(scale); }
__device__ __forceinline__ uint32_t scale_bits(F16 scale) { return scale.bits; }

// The largest among kLanes neighbouring lanes; every lane of the warp takes part.
template <int kLanes>
__device__ __forceinline__ uint32_t largest_of(uint32_t value) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) value = max(value, __shfl_xor_sync(kFullWarp, value, lane));
  return value;
}

// What one lane loads of one half.
template <Format kFormat>
struct Loaded {
  uint4 grad, exp_avg, exp_avg_sq, master;
  QuadCodes<kFormat> codes;
  uint32_t residuals;
  typename ScaleOf<kFormat>::type scale;
};

template <Format kFormat, AdamMode kMode, bool kMoments8>
struct Chunk {
  const MaskedAdamArgs& args;
  const Shared& shared;
  const SharedMaps& maps;
  const RowStep& row_step;
  int64_t row;
  float grad_scale;
  bool wide;

  static constexpr bool kHasMaster = kMode == AdamMode::master, kHasResidual = kMode == AdamMode::residual;
  static constexpr bool kIsEco = kMode == AdamMode::eco;

  __device__ __forceinline__ int64_t element(int64_t col) const { return row * args.cols + col; }
  __device__ __forceinline__ int count(int64_t col) const { return quad_count(col, args.cols); }
  // Columns are never negative: divided as unsigned numbers they are shifted once.
  __device__ __forceinline__ static uint64_t block(int64_t col) { return static_cast<uint64_t>(col) / kBlockSize; }
  __device__ __forceinline__ static bool starts(int64_t col, int64_t size) {
    return static_cast<uint64_t>(col) % static_cast<uint64_t>(size) == 0;
  }
  __device__ __forceinline__ uint8_t* codes_at(int64_t col) const {
    return args.codes + row * code_bytes(kFormat, args.cols) + static_cast<uint64_t>(col) * code_bits(kFormat) / 8;
  }
  // Of formats that have scales.
  __device__ __forceinline__ auto* scale_at(int64_t col) const {
    return static_cast<typename BlockCodec<kFormat>::Scale*>(args.absmax) + row * num_blocks(kFormat, args.cols) +
           block(col);
  }
  // Of the whole chunk, so lanes past the row's end have one too.
  __device__ __forceinline__ float* moment_absmax_at(float* absmax, int64_t col) const {
    return absmax + row * num_moment_blocks(args.cols) + static_cast<uint64_t>(col) / kMomentBlock;
  }
  __device__ __forceinline__ float load_moment_absmax(float* absmax, int64_t col) const {
    return kMoments8 && absmax ? *moment_absmax_at(absmax, col) : 0.0f;
  }

  __device__ __forceinline__ uint4 load_moment(const void* data, const float* absmax, int64_t col) const {
    if (kMoments8 && absmax) return load_four<1>(at(data, element(col), 1), count(col), wide);
    return load_four<4>(at(data, element(col), 4), count(col), wide);
  }
  // `is_codes`: and with the map's values and the chunk's absmax they are moments.
  __device__ __forceinline__ static void unpack_moment(uint4 words, bool is_codes, const float (&value)[256],
                                                       float absmax, float (&moment)[kQuad]) {
    if (kMoments8 && is_codes) {
      decode_moments_quad(value, words.x, absmax, moment);
    } else {
      unpack(words, DType::f32, moment);
    }
  }

  __device__ __forceinline__ Loaded<kFormat> load(int64_t col) const {
    Loaded<kFormat> in = {};
    const int n = count(col);
    in.grad = load_floats(args.grad, element(col), args.grad_dtype, n, wide);
    in.exp_avg = load_moment(args.exp_avg, args.exp_avg_absmax, col);
    in.exp_avg_sq = load_moment(args.exp_avg_sq, args.exp_avg_sq_absmax, col);
    if constexpr (kHasMaster) in.master = load_floats(args.master, element(col), args.master_dtype, n, wide);
    if constexpr (kHasResidual) in.residuals = load_four<1>(args.residual + element(col), n, wide).x;
    if (n == 0) return in;
    in.codes = load_codes<kFormat>(codes_at(col));
    if constexpr (kFormat != Format::bf16) in.scale = *scale_at(col);
    return in;
  }

  // Stores the stepped master and rounds the weights to it. Not 0 if a bit changed.
  __device__ __forceinline__ uint32_t store_master(int64_t col, uint4 old, float (&weight)[kQuad]) const {
    const bool f32 = args.master_dtype == DType::f32;
    uint4 words = pack(weight);
    if (!f32) {
      uint32_t pairs[kQuad / 2];
      to_bf16_pairs(weight, pairs);
      words = make_uint4(pairs[0], pairs[1], 0, 0);
      unpack(words, DType::bf16, weight);
      store_four<2>(at(args.master, element(col), 2), words, count(col), wide);
    } else {
      store_four<4>(at(args.master, element(col), 4), words, count(col), wide);
    }
    return (words.x ^ old.x) | (words.y ^ old.y) | (words.z ^ old.z) | (words.w ^ old.w);
  }

  // Steps and encodes a half; its moments stay in `quad`. Not 0 if a bit of codes, absmax, master or residual changed.
  __device__ __forceinline__ uint32_t step(const Loaded<kFormat>& in, int64_t col, AdamQuad& quad) const {
    const int n = count(col);
    if constexpr (kHasMaster) {
      unpack(in.master, args.master_dtype, quad.weight);
    } else {
      float step = 1.0f;
      if constexpr (kFormat != Format::bf16) step = BlockCodec<kFormat>::step(in.scale);
      decode_quad<kFormat, kMode>(in.codes, in.residuals, step, shared.nf4, quad.weight);
    }
    float grad[kQuad];
    unpack(in.grad, args.grad_dtype, grad);
    step_quad(row_step.scalars, grad_scale, grad, n, quad);

    uint32_t difference = 0;
    if constexpr (kHasMaster) difference = store_master(col, in.master, quad.weight);
    float new_step = 1.0f, inverse = 1.0f;
    if constexpr (kFormat != Format::bf16) {
      using Codec = BlockCodec<kFormat>;
      const auto scale = Codec::make_scale(bits_float(largest_of<kBlockLanes>(quad_magnitude(quad.weight))));
      new_step = Codec::step(scale);
      inverse = inverse_step(new_step);
      if (n > 0 && starts(col, kBlockSize)) {
        difference |= scale_bits(scale) ^ scale_bits(in.scale);
        *scale_at(col) = scale;
      }
    }
    QuadCodes<kFormat> codes;
    if (!kHasMaster && !kHasResidual && args.stochastic) {
      const Random4 random = random_quad(args.seed, row_step.step, args.first_element + element(col));
      codes = encode_quad<kFormat>(quad.weight, inverse, &random, n, shared.nf4);
    } else {
      codes = encode_quad<kFormat>(quad.weight, inverse, nullptr, n, shared.nf4);
    }
    if (n > 0) {
      // The bytes past the row's end keep what they hold.
      const QuadCodes<kFormat> changed = (codes ^ in.codes) & quad_code_mask<kFormat>(n);
      difference |= static_cast<uint32_t>(changed) | static_cast<uint32_t>(uint64_t{changed} >> 32);
      store_codes<kFormat>(codes_at(col), in.codes ^ changed);
    }
    if constexpr (kHasResidual) {
      const uint32_t residuals = encode_residual_quad<kFormat>(quad.weight, codes, new_step, shared.nf4);
      store_four<1>(args.residual + element(col), make_uint4(residuals, 0, 0, 0), n, wide);
      const uint32_t used = n == 0 ? 0u : 0xffffffffu >> (32 - 8 * n);
      difference |= (residuals ^ in.residuals) & used;
    }
    if constexpr (kIsEco) carry_error_quad<kFormat>(row_step.scalars, codes, new_step, shared.nf4, n, quad);
    return difference;
  }

  template <bool kSigned>
  __device__ __forceinline__ void store_moment(void* data, float* absmax, const Dynamic8Lookup<kSigned>& map,
                                               int64_t col, const float (&first)[kQuad],
                                               const float (&second)[kQuad]) const {
    if (kMoments8 && absmax) {
      const float largest = bits_float(largest_of<kWarp>(max(quad_magnitude(first), quad_magnitude(second))));
      const float inverse = inverse_step(largest);
      if (starts(col, kMomentBlock) && count(col) > 0) *moment_absmax_at(absmax, col) = largest;
      const uint32_t low = encode_moments_quad(map, first, inverse), high = encode_moments_quad(map, second, inverse);
      store_four<1>(at(data, element(col), 1), make_uint4(low, 0, 0, 0), count(col), wide);
      store_four<1>(at(data, element(col + kHalf), 1), make_uint4(high, 0, 0, 0), count(col + kHalf), wide);
    } else {
      store_four<4>(at(data, element(col), 4), pack(first), count(col), wide);
      store_four<4>(at(data, element(col + kHalf), 4), pack(second), count(col + kHalf), wide);
    }
  }

  // The 256 weights from `col`, less this lane's own offset, on.
  __device__ __forceinline__ uint32_t run(int64_t col) const {
    Loaded<kFormat> in[kHalves];
    AdamQuad quad[kHalves];
    const float exp_avg_absmax = load_moment_absmax(args.exp_avg_absmax, col);
    const float exp_avg_sq_absmax = load_moment_absmax(args.exp_avg_sq_absmax, col);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) in[half] = load(col + half * kHalf);
    uint32_t difference = 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      unpack_moment(in[half].exp_avg, args.exp_avg_absmax, maps.exp_avg.value, exp_avg_absmax, quad[half].exp_avg);
      unpack_moment(in[half].exp_avg_sq, args.exp_avg_sq_absmax, maps.exp_avg_sq.value, exp_avg_sq_absmax,
                    quad[half].exp_avg_sq);
      difference |= step(in[half], col + half * kHalf, quad[half]);
    }
    store_moment(args.exp_avg, args.exp_avg_absmax, maps.exp_avg, col, quad[0].exp_avg, quad[1].exp_avg);
    store_moment(args.exp_avg_sq, args.exp_avg_sq_absmax, maps.exp_avg_sq, col, quad[0].exp_avg_sq, quad[1].exp_avg_sq);
    return difference;
  }
};

// One lane a row: it alone reads and writes the row's step.
__device__ __forceinline__ RowStep prepare_row(const MaskedAdamArgs& args, int64_t row) {
  if (args.active && !args.active[row]) return {};
  const int32_t step = args.step[row] + 1;
  args.step[row] = step;
  return {adam_scalars(args.lr, args.beta1, args.beta2, args.eps, args.weight_decay, step), step};
}

template <Format kFormat, AdamMode kMode, bool kMoments8>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) masked_adam_kernel(MaskedAdamArgs args, bool wide) {
  __shared__ Shared shared;
  __shared__ SharedMaps maps;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  if (args.found_inf && *args.found_inf != 0.0f) return;
  if constexpr (is_nf4(kFormat)) copy_table(shared.nf4, kNf4, thread, kThreads);
  if constexpr (kMoments8) {
    copy_table(maps.exp_avg, kExpAvgMap, thread, kThreads);
    copy_table(maps.exp_avg_sq, kExpAvgSqMap, thread, kThreads);
  }
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  const int64_t chunks = num_moment_blocks(args.cols);
  // A block's rows lie apart, since inactive rows are neighbours: an expert's.
  const auto row_of = [](int r) { return blockIdx.x + int64_t{r} * gridDim.x; };
  const int rows = static_cast<int>((args.num_rows - 1 - blockIdx.x) / gridDim.x) + 1;
  if (thread < rows) shared.row[thread] = prepare_row(args, row_of(thread));
  __syncthreads();
  uint32_t difference = 0;
  int row = 0;
  for (int64_t chunk = warp;; chunk += kWarps) {
    while (row < rows && chunk >= chunks) chunk -= chunks, ++row;
    if (row == rows) break;
    if (shared.row[row].step == 0) continue;
    const Chunk<kFormat, kMode, kMoments8> work{args, shared, maps, shared.row[row], row_of(row), grad_scale, wide};
    difference |= work.run(chunk * kMomentBlock + lane * kQuad);
  }
  if (args.changed && difference != 0) *args.changed = 1;
}

}  // namespace

void masked_adam(const MaskedAdamArgs& args, void* stream) {
  if (args.num_rows == 0) return;
  const unsigned blocks = adam_groups(args.num_rows, int64_t{multiprocessors()} * kBlocksPerSm, kMaxRows, kMaxGridX);
  with_adam_kernel(args, [&]<Format kFormat, AdamMode kMode, bool kMoments8>() {
    launch("masked_adam", masked_adam_kernel<kFormat, kMode, kMoments8>, dim3(blocks), dim3(kThreads), stream, args,
           rows_are_aligned(args));
  });
}

}  // namespace usaf::gpu
