// Stable counting sort of (token, slot) pairs by expert on NVIDIA GPUs.
//
// One warp owns a chunk of the pairs and the chunk's row of `counts`. It goes through the chunk 32 pairs at a time (the
// loads of four times as many started together): __match_any_sync gives each lane the lanes with its expert, whose
// population is what the chunk's count grows by, and whose lower lanes are the pair's rank. Between the two passes over
// the pairs the counts become prefixes over the chunks. Every cell has one writer: no atomics, any number of experts,
// and the order of the pairs is kept. Bytes: 16 a pair read, 8 written, and 12 for each of the counts.
#include <limits>
#include <stdexcept>

#include "kernel_api.h"
#include "launch.h"
#include "pack.h"

namespace usaf::gpu {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // counts or pairs of a lane whose loads are started together

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ unsigned lower_lanes() { return (1u << lane_id()) - 1u; }

// The experts of this lane's pairs of the next kInFlight times 32, or num_experts: "not here", or past `end`.
__device__ __forceinline__ void load_experts(const SortByExpertArgs& args, int64_t first, int64_t end,
                                             int (&expert)[kInFlight]) {
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    const int64_t pair = first + j * 32 + lane_id();
    const int64_t index = pair < end ? __ldg(args.index + pair) : args.num_experts;
    expert[j] = static_cast<int>(index >= 0 && index < args.num_experts ? index : args.num_experts);
  }
}

__device__ __forceinline__ int64_t chunk_end(int64_t begin, int64_t chunk_pairs, int64_t num_pairs) {
  return begin + chunk_pairs < num_pairs ? begin + chunk_pairs : num_pairs;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sort_count_kernel(SortByExpertArgs args, int64_t num_pairs, int64_t chunk_pairs) {
  const int64_t chunk = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t begin = chunk * chunk_pairs;
  if (begin >= num_pairs) return;
  int32_t* counts = args.counts + chunk * args.num_experts;
  for (int64_t e = lane_id(); e < args.num_experts; e += 32) counts[e] = 0;
  __syncwarp();
  const int64_t end = chunk_end(begin, chunk_pairs, num_pairs);
  for (int64_t first = begin; first < end; first += 32 * kInFlight) {
    int experts[kInFlight];
    load_experts(args, first, end, experts);
#pragma unroll
    for (const int expert : experts) {
      const unsigned peers = __match_any_sync(kFullWarp, expert);
      if (expert < args.num_experts && (peers & lower_lanes()) == 0) counts[expert] += __popc(peers);
      __syncwarp();
    }
  }
}

__device__ __forceinline__ int inclusive_scan(int value) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(delta));
    if (lane_id() >= delta) value += below;
  }
  return value;
}

// A warp an expert: counts become what earlier chunks hold of it, offsets[e + 1] the expert's total.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sort_prefix_kernel(SortByExpertArgs args, int64_t num_chunks) {
  const int64_t expert = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (expert >= args.num_experts) return;
  int total = 0;
  for (int64_t first = 0; first < num_chunks; first += 32 * kInFlight) {
    int count[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t chunk = first + j * 32 + lane_id();
      count[j] = chunk < num_chunks ? args.counts[chunk * args.num_experts + expert] : 0;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t chunk = first + j * 32 + lane_id();
      const int end = inclusive_scan(count[j]);
      if (chunk < num_chunks) args.counts[chunk * args.num_experts + expert] = total + end - count[j];
      total += __shfl_sync(kFullWarp, end, 31);
    }
  }
  if (lane_id() == 0) args.offsets[expert + 1] = total;
}

// One warp: the experts' totals become offsets.
__global__ void __launch_bounds__(32) sort_offsets_kernel(int32_t* offsets, int64_t num_experts) {
  int total = 0;
  for (int64_t first = 0; first < num_experts; first += 32) {
    const int64_t expert = first + lane_id();
    const int end = inclusive_scan(expert < num_experts ? offsets[expert + 1] : 0);
    if (expert < num_experts) offsets[expert + 1] = total + end;
    total += __shfl_sync(kFullWarp, end, 31);
  }
  if (lane_id() == 0) offsets[0] = 0;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sort_place_kernel(SortByExpertArgs args, int64_t num_pairs, int64_t chunk_pairs) {
  const int64_t chunk = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t begin = chunk * chunk_pairs;
  if (begin >= num_pairs) return;
  int32_t* counts = args.counts + chunk * args.num_experts;
  const int placed = __ldg(args.offsets + args.num_experts);
  const int64_t end = chunk_end(begin, chunk_pairs, num_pairs);
  for (int64_t first = begin; first < end; first += 32 * kInFlight) {
    int experts[kInFlight];
    load_experts(args, first, end, experts);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t pair = first + j * 32 + lane_id();
      const int expert = experts[j];
      const bool here = expert < args.num_experts;
      const unsigned peers = __match_any_sync(kFullWarp, expert);
      const bool leads = here && (peers & lower_lanes()) == 0;
      const int earlier = __shfl_sync(kFullWarp, leads ? counts[expert] : 0, __ffs(static_cast<int>(peers)) - 1);
      if (leads) counts[expert] = earlier + __popc(peers);
      __syncwarp();
      if (pair >= end) continue;
      const int position = here ? __ldg(args.offsets + expert) + earlier + __popc(peers & lower_lanes()) : -1;
      args.inverse[pair] = position;
      if (here) args.source[position] = static_cast<int32_t>(pair);
      if (pair >= placed) args.source[pair] = -1;  // past what any pair is placed at
    }
  }
}

unsigned blocks_of(int64_t warps) { return static_cast<unsigned>((warps + kWarps - 1) / kWarps); }

}  // namespace

void sort_by_expert(const SortByExpertArgs& args, void* stream) {
  const char* name = "sort_by_expert";
  const int64_t num_pairs = args.num_tokens * args.top_k, num_chunks = num_sort_chunks(num_pairs);
  if (num_pairs > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("index: more than 2^31 - 1 (token, slot) pairs in one call");
  }
  if (args.num_experts >= std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("num_experts: expected less than 2^31 - 1");
  }
  const dim3 block(kThreads);
  if (num_pairs > 0) {
    launch(name, sort_count_kernel, dim3(blocks_of(num_chunks)), block, stream, args, num_pairs,
           sort_chunk_pairs(num_pairs));
  }
  if (args.num_experts > 0) {
    launch(name, sort_prefix_kernel, dim3(blocks_of(args.num_experts)), block, stream, args, num_chunks);
  }
  launch(name, sort_offsets_kernel, dim3(1), dim3(32), stream, args.offsets, args.num_experts);
  if (num_pairs > 0) {
    launch(name, sort_place_kernel, dim3(blocks_of(num_chunks)), block, stream, args, num_pairs,
           sort_chunk_pairs(num_pairs));
  }
}

}  // namespace usaf::gpu
