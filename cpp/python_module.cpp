// pybind11 bindings of the memory classes and the expert layer. No torch header here: torch bundles another pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "device_api.h"
#include "enum_names.h"
#include "errors.h"
#include "kernel_api.h"
#include "memory/expert_pager.h"
#include "memory/expert_store.h"
#include "memory/expert_sweep.h"
#include "memory/page_layout.h"
#include "memory/row_bank.h"
#include "torch/expert_layer.h"
#include "torch/gpu_device_type.h"

namespace py = pybind11;
using namespace usaf;

namespace {

using Address = uintptr_t;  // a tensor's data_ptr(); Python keeps the tensor alive

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Phase parse_phase(const std::string& value) {
  return parse_enum<Phase, 3>(value, "phase",
                              {{{"inference", Phase::inference},
                                {"training_forward", Phase::training_forward},
                                {"backward", Phase::backward}}});
}

ImportanceMetric parse_importance_metric(const std::string& value) {
  return parse_enum<ImportanceMetric, 2>(
      value, "metric",
      {{{"gradient", ImportanceMetric::gradient}, {"gradient_weight", ImportanceMetric::gradient_weight}}});
}

DownAxis parse_down_axis(const std::string& value) {
  return parse_enum<DownAxis, 2>(value, "down_axis",
                                 {{{"hidden", DownAxis::hidden}, {"intermediate", DownAxis::intermediate}}});
}

std::vector<int64_t> per_matrix(const int64_t (&values)[kMatricesPerExpert]) {
  return {std::begin(values), std::end(values)};
}

// Native exceptions become the Python classes of usaf_ext.errors.
void register_errors() {
  py::register_exception_translator([](std::exception_ptr pending) {
    const auto raise = [](const char* name, const std::exception& error) {
      py::set_error(py::module_::import("usaf_ext.errors").attr(name), error.what());
    };
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const StoreError& error) {
      raise("StoreError", error);
    } catch (const BudgetError& error) {
      raise("BudgetError", error);
    } catch (const DeviceError& error) {
      raise("DeviceError", error);
    } catch (const Error& error) {
      raise("UsafError", error);
    }
  });
}

// Bytes that are registered, and why not more.
std::pair<int64_t, std::string> registered(const HostRegistration& registration) {
  return {registration.bytes(), registration.failure()};
}

std::shared_ptr<Device> open_device(const std::string& type, int index) {
  if (type == "cpu") return make_cpu_device();
#ifdef USAF_WITH_GPU
  if (type == gpu_device_type()) return make_gpu_device(index);
  throw std::invalid_argument("device: expected 'cpu' or '" + gpu_device_type() + "', got '" + type + "'");
#else
  throw std::invalid_argument("device: this build of usaf_ext has no GPU kernels, got '" + type + "' " +
                              std::to_string(index));
#endif
}

void bind_device(py::module_& m) {
  py::class_<Device, std::shared_ptr<Device>>(m, "Device")
      .def_property_readonly("name", &Device::name)
      .def("memory_info",
           [](const Device& self) {
             const MemoryInfo info = self.memory_info();
             return std::pair(info.free_bytes, info.total_bytes);
           })
      .def_property_readonly("host_waits", &Device::host_waits);
  m.def("open_device", &open_device, py::arg("type"), py::arg("index") = 0);
}

void bind_store(py::module_& m) {
  py::class_<PageLayout>(m, "PageLayout")
      .def(py::init([](const std::string& format, int64_t hidden_size, int64_t intermediate_size,
                       const std::string& down_axis) {
             if (hidden_size < 1 || intermediate_size < 1)
               throw std::invalid_argument("hidden_size, intermediate_size: expected at least 1");
             return make_page_layout(parse_format(format), hidden_size, intermediate_size, parse_down_axis(down_axis));
           }),
           py::arg("format"), py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("down_axis") = "hidden")
      .def_property_readonly("format", [](const PageLayout& self) { return format_name(self.format); })
      .def_readonly("hidden_size", &PageLayout::hidden_size)
      .def_readonly("intermediate_size", &PageLayout::intermediate_size)
      .def_property_readonly(
          "down_axis",
          [](const PageLayout& self) { return self.down_axis == DownAxis::hidden ? "hidden" : "intermediate"; })
      .def_property_readonly("rows", [](const PageLayout& self) { return per_matrix(self.rows); })
      .def_property_readonly("cols", [](const PageLayout& self) { return per_matrix(self.cols); })
      .def_readonly("page_bytes", &PageLayout::page_bytes)
      .def_readonly("payload_bytes", &PageLayout::payload_bytes)
      .def_property_readonly("codes_offset", [](const PageLayout& self) { return per_matrix(self.codes_offset); })
      .def_property_readonly("absmax_offset", [](const PageLayout& self) { return per_matrix(self.absmax_offset); });

  py::class_<ExpertStore, std::shared_ptr<ExpertStore>>(m, "ExpertStore")
      .def(py::init<int64_t, int64_t, const PageLayout&>(), py::arg("num_layers"), py::arg("num_experts"),
           py::arg("layout"))
      .def_static(
          "from_files",
          [](int64_t num_layers, int64_t num_experts, const PageLayout& layout,
             const std::vector<std::pair<std::string, int64_t>>& files,
             const std::vector<std::pair<int64_t, int64_t>>& places) {
            std::vector<PageFile> page_files;
            for (const auto& [path, bytes] : files) page_files.push_back({path, bytes});
            std::vector<PagePlace> page_places;
            for (const auto& [file, offset] : places) page_places.push_back({file, offset});
            auto opened = std::make_unique<PageFiles>(std::move(page_files), std::move(page_places), layout.page_bytes);
            return std::make_shared<ExpertStore>(num_layers, num_experts, layout, std::move(opened));
          },
          py::arg("num_layers"), py::arg("num_experts"), py::arg("layout"), py::arg("files"), py::arg("places"))
      .def(
          "read_page",
          [](const ExpertStore& self, int64_t layer, int64_t expert, const py::buffer& target) {
            const py::buffer_info info = target.request(true);
            if (info.size * info.itemsize != self.layout().page_bytes || info.ndim != 1 ||
                reinterpret_cast<Address>(info.ptr) % kPageAlign != 0) {
              throw std::invalid_argument("buffer: expected " + std::to_string(self.layout().page_bytes) +
                                          " bytes aligned to " + std::to_string(kPageAlign));
            }
            py::gil_scoped_release no_gil;
            self.read_page(layer, expert, static_cast<uint8_t*>(info.ptr));
          },
          py::arg("layer"), py::arg("expert"), py::arg("buffer"))
      .def_property_readonly("on_disk", &ExpertStore::on_disk)
      .def_property_readonly("direct", [](const ExpertStore& self) { return self.on_disk() && self.files()->direct(); })
      .def(
          "page",
          [](ExpertStore& self, int64_t layer, int64_t expert) {
            const int64_t bytes = self.layout().page_bytes;
            return self.sealed() ? py::memoryview::from_memory(self.page(layer, expert), bytes)
                                 : py::memoryview::from_memory(self.writable_page(layer, expert), bytes);
          },
          py::arg("layer"), py::arg("expert"), py::keep_alive<0, 1>())
      .def("seal", &ExpertStore::seal)
      .def(
          "register_with",
          [](ExpertStore& self, std::shared_ptr<Device> device) {
            py::gil_scoped_release no_gil;
            return registered(self.register_with(std::move(device)));
          },
          py::arg("device"))
      .def_property_readonly("sealed", &ExpertStore::sealed)
      .def_property_readonly("bytes", &ExpertStore::bytes)
      .def_property_readonly("num_layers", &ExpertStore::num_layers)
      .def_property_readonly("num_experts", &ExpertStore::num_experts);
}

py::dict stats_dict(const PagerStats& stats) {
  py::dict result;
  result["page_hits"] = stats.page_hits;
  result["page_misses"] = stats.page_misses;
  result["bytes_in"] = stats.bytes_in;
  result["bytes_out"] = stats.bytes_out;
  result["bytes_read"] = stats.bytes_read;
  result["stall_seconds"] = stats.stall_seconds;
  result["read_stall_seconds"] = stats.read_stall_seconds;
  return result;
}

void bind_pager(py::module_& m) {
  py::class_<ExpertPager, std::shared_ptr<ExpertPager>>(m, "ExpertPager")
      .def(py::init([](std::shared_ptr<ExpertStore> store, Address slab, int64_t num_slots, py::object owner,
                       int64_t num_buffers, std::shared_ptr<Device> device) {
             auto pager = std::make_unique<ExpertPager>(std::move(device), std::move(store), pointer<void>(slab),
                                                        num_slots, num_buffers);
             // The slab's owner outlives the pager and so every copy in flight, whoever holds the pager last.
             return std::shared_ptr<ExpertPager>(pager.release(),
                                                 [owner = std::move(owner)](ExpertPager* last) mutable {
                                                   delete last;
                                                   py::gil_scoped_acquire gil;
                                                   owner = py::none();
                                                 });
           }),
           py::arg("store"), py::arg("slab"), py::arg("num_slots"), py::arg("owner"), py::arg("num_buffers"),
           py::arg("device"))
      .def_property_readonly("num_slots", &ExpertPager::num_slots)
      .def_property_readonly("max_group", &ExpertPager::max_group)
      .def(
          "prefetch",
          [](ExpertPager& self, int64_t layer, const std::vector<int64_t>& experts, const std::string& phase) {
            return self.prefetch(layer, experts, parse_phase(phase));
          },
          py::arg("layer"), py::arg("experts"), py::arg("phase"))
      .def("experts_of", &ExpertPager::experts_of, py::arg("ticket"))
      .def(
          "wait",
          [](ExpertPager& self, ExpertPager::Ticket ticket, Address stream) {
            py::gil_scoped_release no_gil;
            self.wait(ticket, pointer<void>(stream));
          },
          py::arg("ticket"), py::arg("stream") = 0)
      .def(
          "pages",
          [](const ExpertPager& self, ExpertPager::Ticket ticket) {
            std::vector<Address> addresses;
            for (const uint8_t* page : self.pages(ticket)) addresses.push_back(reinterpret_cast<Address>(page));
            return addresses;
          },
          py::arg("ticket"))
      .def(
          "release",
          [](ExpertPager& self, ExpertPager::Ticket ticket, Address stream) {
            self.release(ticket, pointer<void>(stream));
          },
          py::arg("ticket"), py::arg("stream") = 0)
      .def("cancel", &ExpertPager::cancel, py::arg("ticket"))
      .def("reset", &ExpertPager::reset, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_buffers", &ExpertPager::num_buffers)
      .def_property_readonly("registered_buffers",
                             [](const ExpertPager& self) -> std::optional<std::pair<int64_t, std::string>> {
                               const HostRegistration* registration = self.buffer_registration();
                               if (registration == nullptr) return std::nullopt;
                               return registered(*registration);
                             })
      .def("resize_ring", &ExpertPager::resize_ring, py::arg("num_buffers"), py::call_guard<py::gil_scoped_release>())
      .def("stats", [](const ExpertPager& self) { return stats_dict(self.stats()); })
      .def("reset_stats", &ExpertPager::reset_stats);

  py::class_<ExpertSweep, std::shared_ptr<ExpertSweep>>(m, "ExpertSweep")
      .def(py::init<std::shared_ptr<ExpertPager>>(), py::arg("pager"))
      .def("rethrow_failure", &ExpertSweep::rethrow_failure, py::arg("text"));
}

void bind_layer(py::module_& m) {
  py::class_<RowBank, std::shared_ptr<RowBank>>(m, "RowBank")
      .def(py::init([](const std::string& format, int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                       const std::vector<int32_t>& neuron_expert, const std::vector<int32_t>& neuron_index,
                       Address codes, Address absmax, Address grad, const std::string& grad_dtype,
                       Address neuron_expert_ptr, Address neuron_index_ptr, Address expert_hit, Address grad_squares,
                       Address overlay_rows) {
             return std::make_shared<RowBank>(
                 parse_format(format), num_experts, hidden_size, intermediate_size, neuron_expert, neuron_index,
                 BankPointers{pointer<const uint8_t>(codes), pointer<const void>(absmax), pointer<void>(grad),
                              parse_dtype(grad_dtype), pointer<const int32_t>(neuron_expert_ptr),
                              pointer<const int32_t>(neuron_index_ptr), pointer<uint8_t>(expert_hit),
                              pointer<double>(grad_squares), pointer<const int64_t>(overlay_rows)});
           }),
           py::arg("format"), py::arg("num_experts"), py::arg("hidden_size"), py::arg("intermediate_size"),
           py::arg("neuron_expert"), py::arg("neuron_index"), py::arg("codes_ptr"), py::arg("absmax_ptr"),
           py::arg("grad_ptr"), py::arg("grad_dtype"), py::arg("neuron_expert_ptr"), py::arg("neuron_index_ptr"),
           py::arg("expert_hit_ptr"), py::arg("grad_squares_ptr"), py::arg("overlay_rows_ptr"))
      .def_property_readonly("num_neurons", &RowBank::num_neurons);

  py::class_<ExpertLayer, std::shared_ptr<ExpertLayer>>(m, "ExpertLayer")
      .def(py::init([](std::shared_ptr<ExpertSweep> sweep, int64_t layer, const std::string& activation,
                       const std::string& dtype, Address scratch) {
             return std::make_shared<ExpertLayer>(std::move(sweep), layer, parse_activation(activation),
                                                  parse_dtype(dtype), pointer<void>(scratch));
           }),
           py::arg("sweep"), py::arg("layer"), py::arg("activation"), py::arg("dtype"), py::arg("scratch"))
      .def_property_readonly("handle", &ExpertLayer::handle)
      .def_property_readonly("uses_panels", &panels_available)
      .def(
          "set_bank", [](ExpertLayer& self, std::shared_ptr<RowBank> bank) { self.bank = std::move(bank); },
          py::arg("bank").none(true))
      .def(
          "set_frozen_bank",
          [](ExpertLayer& self, std::shared_ptr<RowBank> bank) { self.frozen_bank = std::move(bank); },
          py::arg("bank").none(true))
      .def(
          "set_threshold",
          [](ExpertLayer& self, double alpha, Address counts) {
            self.set_threshold(alpha, pointer<const int64_t>(counts));
          },
          py::arg("alpha"), py::arg("counts_ptr"))
      .def_readonly("num_masked", &ExpertLayer::num_masked)
      .def(
          "set_importance",
          [](ExpertLayer& self, Address address, const std::string& metric) {
            self.importance_metric = parse_importance_metric(metric);
            self.importance = pointer<float>(address);
          },
          py::arg("address"), py::arg("metric"))
      .def(
          "set_token_counts", [](ExpertLayer& self, Address address) { self.token_counts = pointer<int32_t>(address); },
          py::arg("address"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of usaf_ext; use it through the Python modules.";
  register_errors();
  m.attr("TORCH_VERSION") = USAF_TORCH_VERSION;
#ifdef USAF_WITH_GPU
  m.attr("GPU_BACKEND") = USAF_GPU_NAME;
#else
  m.attr("GPU_BACKEND") = py::none();
#endif
  py::list formats;
  for (int format = 0; format < kNumFormats; ++format) formats.append(format_name(static_cast<Format>(format)));
  m.attr("FORMATS") = py::tuple(formats);
  m.attr("BLOCK_SIZE") = kBlockSize;
  m.attr("PAGE_ALIGN") = kPageAlign;
  m.def(
      "code_bytes", [](const std::string& format, int64_t cols) { return code_bytes(parse_format(format), cols); },
      py::arg("format"), py::arg("cols"));
  m.def(
      "num_blocks", [](const std::string& format, int64_t cols) { return num_blocks(parse_format(format), cols); },
      py::arg("format"), py::arg("cols"));
  m.def(
      "scale_dtype",
      [](const std::string& format) { return scale_bytes(parse_format(format)) == 2 ? "float16" : "float32"; },
      py::arg("format"));
  m.def("detected_isa", [] { return cpu::kIsaNames[static_cast<int>(cpu::detected_isa())]; });
  m.def(
      "limit_isa",
      [](const std::string& name) {
        cpu::limit_isa(parse_enum<cpu::Isa, cpu::kNumIsas>(
            name, "name", {{{"plain", cpu::Isa::plain}, {"avx2", cpu::Isa::avx2}, {"avx512", cpu::Isa::avx512}}}));
      },
      py::arg("name"));
  m.def("release_thread_pool", &cpu::release_thread_pool);
  bind_device(m);
  bind_store(m);
  bind_pager(m);
  bind_layer(m);
}
