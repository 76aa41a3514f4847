// Test-only: what torch asks of a device besides kernels. One device. Torch's work on it is done when the call returns:
// its streams are eager ones of the emulated runtime, so that an event recorded on one is done at once.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pthread.h>

#include "../runtime.h"
#include "memory.h"
#include "random.h"

namespace fake_gpu {
namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;

// Each thread's current stream: 0, or the address of the runtime's stream. No thread-local variable: one in this
// library is a kernel's shared memory to the emulator.
pthread_key_t current_stream_key() {
  static const pthread_key_t key = [] {
    pthread_key_t created{};
    TORCH_CHECK(pthread_key_create(&created, nullptr) == 0, "pthread_key_create failed");
    return created;
  }();
  return key;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override { return setDevice(device), kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.type() == kType && device.index() <= 0, "expected a device of the fake GPU, got ", device);
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return stream(pthread_getspecific(current_stream_key())); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(nullptr); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return new_stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return new_stream(); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const c10::Stream previous = getStream(kDevice);
    TORCH_CHECK(pthread_setspecific(current_stream_key(), next.native_handle()) == 0, "pthread_setspecific failed");
    return previous;
  }
  void* getStreamNativeHandle(const c10::Stream of) const override { return reinterpret_cast<void*>(of.id()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override { emulator::runtime::synchronize_device(); }

  void record(void** event, const c10::Stream& of, c10::DeviceIndex, c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(of.id() + 1);  // anything but null, which means never recorded
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void*, void*, c10::DeviceIndex) const override { return 0; }

 private:
  static c10::Stream stream(void* handle) {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, reinterpret_cast<c10::StreamId>(handle));
  }
  static c10::Stream new_stream() {
    void* handle = nullptr;
    emulator::runtime::create_eager_stream(&handle);  // torch keeps a device's streams to the end of the process
    return stream(handle);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// A CPU generator that says it is the device's.
struct DeviceGenerator final : c10::GeneratorImpl {
  explicit DeviceGenerator(at::Generator cpu_generator)
      : GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), cpu(std::move(cpu_generator)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(cpu.clone()); }

  at::Generator cpu;
};

at::Generator make_generator() { return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator()); }

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex index) const override { TORCH_CHECK(index == 0, "no device ", int{index}); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return setCurrentDevice(index), 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return make_generator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

[[maybe_unused]] const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);  // torch keeps it to the end of the process
  return true;
}();

}  // namespace

const at::Generator& default_generator() {
  static const at::Generator generator = make_generator();
  return generator;
}

at::Generator inner_generator(const at::Generator& generator) {
  const auto* device = dynamic_cast<const DeviceGenerator*>(generator.unsafeGetGeneratorImpl());
  TORCH_CHECK(device != nullptr, "Expected a '", kDevice.type(), "' device type for generator but found '",
              generator.device().type(), "'");
  return device->cpu;
}

}  // namespace fake_gpu
