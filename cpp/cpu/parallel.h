// Threads and instruction sets of the CPU kernels: the only place with an OpenMP pragma or a target attribute.
#pragma once
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

// Compiled once for every x86-64 level and chosen at load time. No clone changes a bit of a result: contraction is off
// and no flag lets the compiler reorder. Sanitizers and other compilers take the baseline (ifuncs run before them).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define USAF_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define USAF_CLONES
#endif

namespace usaf::cpu {

inline constexpr int64_t kMinParallelWork = 32768;  // weights; below it starting the threads costs more than they save

// body(i) for i in [0, count), each in exactly one thread. `work` is the cost of one item, in weights touched.
// torch.set_num_threads sets the number of threads.
template <class Body>
void parallel_for(int64_t count, int64_t work, const Body& body) {
#pragma omp parallel for schedule(static) if (count > 1 && count * work >= kMinParallelWork)
  for (int64_t i = 0; i < count; ++i) body(i);
}

// The same in runs of neighbouring items: body(first, last).
template <class Body>
void parallel_for_runs(int64_t count, int64_t work, const Body& body) {
  constexpr int64_t kRun = 16;
  parallel_for((count + kRun - 1) / kRun, kRun * work,
               [&](int64_t run) { body(run * kRun, (run + 1) * kRun < count ? (run + 1) * kRun : count); });
}

// The same for items of unequal cost.
template <class Body>
void parallel_for_uneven(int64_t count, int64_t work, const Body& body) {
#pragma omp parallel for schedule(dynamic) if (count > 1 && count * work >= kMinParallelWork)
  for (int64_t i = 0; i < count; ++i) body(i);
}

// body(i, worker) for i in [0, count), in threads numbered worker = 0 to max_workers() - 1, each with its own scratch.
// Items go to whoever is free: a thread that shares its core with a copy of pages takes fewer.
template <class Body>
void parallel_for_workers(int64_t count, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) body(i, static_cast<int64_t>(omp_get_thread_num()));
#else
  for (int64_t i = 0; i < count; ++i) body(i, int64_t{0});
#endif
}

inline int64_t max_workers() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Ends the threads that wait for the calling thread's next parallel region; they come back with it. libgomp keeps some
// for each thread that ever had such a region, and while they outnumber the processors nobody waits actively: every
// region of every thread then starts late (measured: 0.35 s became 0.8 s).
inline void release_thread_pool() {
#ifdef _OPENMP
  omp_pause_resource_all(omp_pause_soft);
#endif
}

}  // namespace usaf::cpu
