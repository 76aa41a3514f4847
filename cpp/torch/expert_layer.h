// One MoE layer's experts, as the ops usaf::experts_forward and usaf::experts_backward run them. No torch in this
// header: the Python module builds these objects, and the ops find them by handle.
#pragma once
#include <cstdint>
#include <memory>

#include "../kernel_api.h"
#include "../memory/expert_sweep.h"
#include "../memory/row_bank.h"

namespace usaf {

class ExpertLayer {
 public:
  // `scratch`: kMatricesPerExpert * intermediate_size * hidden_size elements of `dtype`, shared by the layers of a
  // model and owned by the caller. Registers the layer under a new handle.
  ExpertLayer(std::shared_ptr<ExpertSweep> sweep, int64_t layer, Activation activation, DType dtype, void* scratch);
  ~ExpertLayer();
  ExpertLayer(const ExpertLayer&) = delete;
  ExpertLayer& operator=(const ExpertLayer&) = delete;

  static ExpertLayer* find(int64_t handle);  // null if no layer has this handle

  int64_t handle() const { return handle_; }
  int64_t layer() const { return layer_; }
  int64_t num_experts() const { return store().num_experts(); }
  const ExpertStore& store() const { return sweep_->pager().store(); }
  const PageLayout& layout() const { return store().layout(); }
  ExpertSweep& sweep() { return *sweep_; }
  Activation activation() const { return activation_; }
  DType dtype() const { return dtype_; }
  void* scratch() const { return scratch_; }

  // The trained neurons (null: none). Decoding overlays their rows; the backward adds to their gradients.
  std::shared_ptr<const RowBank> bank;
  // Where every later backward adds the neurons' importance: [num_experts, intermediate_size], or null.
  float* importance = nullptr;
  // Tokens per expert of the latest forward: [num_experts], on the host, or null.
  int32_t* token_counts = nullptr;

 private:
  std::shared_ptr<ExpertSweep> sweep_;
  int64_t layer_, handle_;
  Activation activation_;
  DType dtype_;
  void* scratch_;
};

}  // namespace usaf
