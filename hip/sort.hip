// Stable counting sort of (token, slot) pairs by expert on AMD GPUs.
//
// A group of 32 lanes (a wave on RDNA, half of one elsewhere) owns a chunk of the pairs and the chunk's row of
// `counts`. It goes through the chunk 32 pairs at a time. RDNA has no match instruction, but a comparison leaves its
// ballot in a scalar register for nothing: one ballot for each bit of the expert's number, combined lane by lane, gives
// the lanes with the same expert. Their population is what the chunk's count grows by, the lower ones are the pair's
// rank. Between the two passes over the pairs the counts become prefixes over the chunks. Every cell has one writer: no
// atomics, any number of experts, and the order of the pairs is kept. All groups of a workgroup run the same number of
// rounds, so that a wave of 64 never splits at a ballot. The experts of four rounds are read together: only the counts
// are read round by round.
// Bytes: 16 a pair read, 8 written, and 12 for each of the counts.
#include <bit>
#include <limits>
#include <stdexcept>

#include "kernel_api.h"
#include "launch.h"

namespace usaf::gpu {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 32;
constexpr int kGroups = kThreads / kGroup;
constexpr int kRounds = 4;  // of a group, whose pairs are read together

__device__ __forceinline__ int group_lane() { return static_cast<int>(threadIdx.x % kGroup); }
__device__ __forceinline__ int64_t group_id() { return int64_t{blockIdx.x} * kGroups + threadIdx.x / kGroup; }

// The group's 32 bits of the wave's ballot.
__device__ __forceinline__ uint32_t group_ballot(bool predicate) {
  const unsigned first = threadIdx.x % static_cast<unsigned>(warpSize) / kGroup * kGroup;
  return static_cast<uint32_t>(static_cast<unsigned long long>(__ballot(predicate)) >> first);
}

// Lanes of the group with this lane's expert.
__device__ __forceinline__ uint32_t peers_of(int expert, int bits) {
  uint32_t peers = 0xffffffffu;
  for (int bit = 0; bit < bits; ++bit) {
    const bool set = (expert >> bit & 1) != 0;
    const uint32_t ones = group_ballot(set);
    peers &= set ? ones : ~ones;
  }
  return peers;
}

// The experts of the lane's pairs first + lane, first + kGroup + lane, ..; num_experts: "not here", or past the end.
__device__ __forceinline__ void load_experts(const int64_t* __restrict__ index, int64_t first, int64_t end,
                                             int64_t num_experts, int (&experts)[kRounds]) {
  int64_t expert[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t pair = first + round * kGroup + group_lane();
    expert[round] = index[pair < end ? pair : 0];
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const bool here = first + round * kGroup + group_lane() < end && expert[round] >= 0 && expert[round] < num_experts;
    experts[round] = static_cast<int>(here ? expert[round] : num_experts);
  }
}

__device__ __forceinline__ int64_t chunk_end(int64_t begin, int64_t chunk_pairs, int64_t num_pairs) {
  return begin + chunk_pairs < num_pairs ? begin + chunk_pairs : num_pairs;
}

// `bits`: of num_experts, the largest number of an expert here.
__global__ void __launch_bounds__(kThreads)
    sort_count_kernel(const int64_t* __restrict__ index, int32_t* counts, int64_t num_pairs, int64_t num_experts,
                      int64_t chunk_pairs, int bits) {
  const int64_t begin = group_id() * chunk_pairs;
  int32_t* mine = counts + group_id() * num_experts;
  if (begin < num_pairs) {
    for (int64_t e = group_lane(); e < num_experts; e += kGroup) mine[e] = 0;
  }
  __threadfence_block();  // what the other lanes of the group wrote
  const int64_t end = chunk_end(begin, chunk_pairs, num_pairs);
  for (int64_t first = begin; first < begin + chunk_pairs; first += kGroup * kRounds) {
    int experts[kRounds];
    load_experts(index, first, end, num_experts, experts);
#pragma unroll
    for (const int expert : experts) {
      const uint32_t peers = peers_of(expert, bits);
      if (expert < num_experts && (peers & ((1u << group_lane()) - 1u)) == 0) mine[expert] += __popc(peers);
      __threadfence_block();
    }
  }
}

__device__ __forceinline__ int inclusive_scan(int value) {
#pragma unroll
  for (int delta = 1; delta < kGroup; delta *= 2) {
    const int below = __shfl_up(value, static_cast<unsigned>(delta), kGroup);
    if (group_lane() >= delta) value += below;
  }
  return value;
}

// A group an expert: counts become what earlier chunks hold of it, offsets[e + 1] the expert's total.
__global__ void __launch_bounds__(kThreads)
    sort_prefix_kernel(int32_t* __restrict__ counts, int32_t* __restrict__ offsets, int64_t num_chunks,
                       int64_t num_experts) {
  constexpr int kInFlight = 8;
  const int64_t expert = group_id();
  int total = 0;
  for (int64_t first = 0; first < num_chunks; first += kGroup * kInFlight) {
    int count[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t chunk = first + j * kGroup + group_lane();
      count[j] = expert < num_experts && chunk < num_chunks ? counts[chunk * num_experts + expert] : 0;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t chunk = first + j * kGroup + group_lane();
      const int end = inclusive_scan(count[j]);
      if (expert < num_experts && chunk < num_chunks) counts[chunk * num_experts + expert] = total + end - count[j];
      total += __shfl(end, kGroup - 1, kGroup);
    }
  }
  if (expert < num_experts && group_lane() == 0) offsets[expert + 1] = total;
}

// The experts' totals become offsets. Both halves of a wave of 64 do the same work; the first one writes.
__global__ void __launch_bounds__(64) sort_offsets_kernel(int32_t* offsets, int64_t num_experts) {
  int total = 0;
  const bool writes = threadIdx.x < kGroup;
  for (int64_t first = 0; first < num_experts; first += kGroup) {
    const int64_t expert = first + group_lane();
    const int end = inclusive_scan(writes && expert < num_experts ? offsets[expert + 1] : 0);
    if (writes && expert < num_experts) offsets[expert + 1] = total + end;
    total += __shfl(end, kGroup - 1, kGroup);
  }
  if (threadIdx.x == 0) offsets[0] = 0;
}

__global__ void __launch_bounds__(kThreads)
    sort_place_kernel(const int64_t* __restrict__ index, const int32_t* __restrict__ offsets, int32_t* counts,
                      int32_t* __restrict__ source, int32_t* __restrict__ inverse, int64_t num_pairs,
                      int64_t num_experts, int64_t chunk_pairs, int bits) {
  const int64_t begin = group_id() * chunk_pairs;
  int32_t* mine = counts + group_id() * num_experts;
  const int placed = offsets[num_experts];
  const int64_t end = chunk_end(begin, chunk_pairs, num_pairs);
  for (int64_t first = begin; first < begin + chunk_pairs; first += kGroup * kRounds) {
    int experts[kRounds], starts[kRounds];
    load_experts(index, first, end, num_experts, experts);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) starts[round] = offsets[experts[round]];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int64_t pair = first + round * kGroup + group_lane();
      const int expert = experts[round];
      const bool here = expert < num_experts;
      const uint32_t peers = peers_of(expert, bits), before = peers & ((1u << group_lane()) - 1u);
      const bool leads = here && before == 0;
      const int earlier = __shfl(leads ? mine[expert] : 0, __ffs(static_cast<int>(peers)) - 1, kGroup);
      if (leads) mine[expert] = earlier + __popc(peers);
      __threadfence_block();
      if (pair >= end) continue;
      const int position = here ? starts[round] + earlier + __popc(before) : -1;
      inverse[pair] = position;
      if (here) source[position] = static_cast<int32_t>(pair);
      if (pair >= placed) source[pair] = -1;  // past what any pair is placed at
    }
  }
}

unsigned workgroups_of(int64_t groups) { return static_cast<unsigned>((groups + kGroups - 1) / kGroups); }

}  // namespace

void sort_by_expert(const SortByExpertArgs& a, void* stream) {
  const char* name = "sort_by_expert";
  const int64_t num_pairs = a.num_tokens * a.top_k, num_chunks = num_sort_chunks(num_pairs);
  if (num_pairs > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("index: more than 2^31 - 1 (token, slot) pairs in one call");
  }
  if (a.num_experts >= std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("num_experts: expected less than 2^31 - 1");
  }
  const dim3 grid(workgroups_of(num_chunks)), block(kThreads);
  const int bits = std::bit_width(static_cast<uint64_t>(a.num_experts));
  if (num_pairs > 0) {
    launch(name, sort_count_kernel, grid, block, stream, a.index, a.counts, num_pairs, a.num_experts,
           sort_chunk_pairs(num_pairs), bits);
  }
  if (a.num_experts > 0) {
    launch(name, sort_prefix_kernel, dim3(workgroups_of(a.num_experts)), block, stream, a.counts, a.offsets, num_chunks,
           a.num_experts);
  }
  launch(name, sort_offsets_kernel, dim3(1), dim3(64), stream, a.offsets, a.num_experts);
  if (num_pairs > 0) {
    launch(name, sort_place_kernel, grid, block, stream, a.index, a.offsets, a.counts, a.source, a.inverse, num_pairs,
           a.num_experts, sort_chunk_pairs(num_pairs), bits);
  }
}

}  // namespace usaf::gpu
