// One MoE layer's experts, as the ops usaf::experts_forward and usaf::experts_backward run them. No torch in this
// header: the Python module builds these objects, and the ops find them by handle.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "../kernel_api.h"
#include "../memory/expert_sweep.h"
#include "../memory/row_bank.h"

namespace usaf {

// What a backward adds to a neuron's importance, over the gradients g of its 3 * hidden_size weights w: the sum of g^2,
// or of |g * w|.
enum class ImportanceMetric : int32_t { gradient = 0, gradient_weight = 1 };

class KeptRoutings;  // expert_routing.h

class ExpertLayer {
 public:
  // `scratch`: kMatricesPerExpert * intermediate_size * hidden_size elements of `dtype` on the device, shared by the
  // layers of a model and owned by the caller. Registers the layer under a new handle.
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

  // The bank whose gradients a backward adds to, or null.
  const RowBank* trained_bank() const { return bank && bank->pointers().grad != nullptr ? bank.get() : nullptr; }

  // An expert with fewer tokens than alpha * (mean over all experts) gets no weight gradient in a backward. `counts`:
  // [num_experts] on the host, or null: the tokens of the micro-batch itself. alpha 0: off. Throws
  // std::invalid_argument for a negative or non-finite alpha.
  void set_threshold(double alpha, const int64_t* counts);
  // Whether `expert` is under the threshold, where the micro-batch's own counts are `tokens` [num_experts].
  bool under_threshold(int64_t expert, const std::vector<int64_t>& tokens) const;

  // The trained neurons, and those trained before and now frozen (null: none). Decoding overlays the rows of both.
  std::shared_ptr<const RowBank> bank, frozen_bank;
  // Where every later backward adds the neurons' importance: [num_experts, intermediate_size] on the device, or null.
  float* importance = nullptr;
  ImportanceMetric importance_metric = ImportanceMetric::gradient;
  // How often so far an expert with tokens in a micro-batch was under the threshold and its bank got no gradient.
  int64_t num_masked = 0;
  // Tokens per expert of the latest forward: [num_experts], on the host, or null.
  int32_t* token_counts = nullptr;
  std::shared_ptr<KeptRoutings> kept_routings;  // of its forwards, for their backwards; null: none yet

 private:
  std::shared_ptr<ExpertSweep> sweep_;
  int64_t layer_, handle_;
  Activation activation_;
  DType dtype_;
  void* scratch_;
  double threshold_alpha_ = 0.0;
  const int64_t* threshold_counts_ = nullptr;
};

// Whether the layer's GEMMs run on panels (expert_panels.h) on this CPU, not on matrices decoded as a whole.
bool panels_available(const ExpertLayer& layer);

}  // namespace usaf
