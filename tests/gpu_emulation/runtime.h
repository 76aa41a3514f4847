// Test-only: the part of the CUDA and HIP runtimes that cuda/device.cu and hip/device.hip use, on the CPU.
// cuda_runtime.h and hip/hip_runtime.h beside this file put the vendors' names on it.
//
// Kernels and the null stream run at once. A created stream, unless it is an eager one, runs nothing until something
// waits for it, and then no more than it must: a copy happens as late as the rules allow, so that a kernel whose wait
// was forgotten reads what was there before. Copies from memory that is not registered happen at once, as the host
// would wait for them. Registered memory must stay writable: where it is read-only, a copy faults.
//
// As in the vendors' runtimes each thread has a current device, and every error is also kept as the thread's last one,
// to be found behind the next launch, until somebody takes it. All devices have the same memory and work alike. In a
// child of fork() there is no runtime: a call ends the process.
#pragma once
#include <cstddef>

namespace emulator::runtime {

enum Error : int { success = 0, invalid_value = 1, out_of_memory = 2, not_ready = 600 };

int get_device(int* device);
int count_devices(int* count);
int set_device(int device);
int create_stream(void** stream);
int create_eager_stream(void** stream);  // runs at once, like the null stream: torch's streams, where ops compute
int destroy_stream(void* stream);
int create_event(void** event);
int destroy_event(void* event);
int record(void* event, void* stream);
int stream_wait(void* stream, void* event);
int query(void* event);
int synchronize(void* event);
int copy_async(void* dst, const void* src, size_t bytes, void* stream);
int synchronize_device();
int register_host(void* pointer, size_t bytes);
int unregister_host(void* pointer);
const char* error_text(int error);

}  // namespace emulator::runtime
