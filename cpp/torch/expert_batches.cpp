#include "expert_batches.h"

#include <algorithm>
#include <string_view>

#include "checks.h"

namespace usaf {
namespace {

using at::Tensor;

void check_micro_batch(const ExpertLayer& layer, const Tensor& x, const Tensor& index, const Tensor& weights) {
  const int64_t hidden_size = layer.layout().hidden_size;
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == hidden_size, "x: expected shape [num_tokens, ", hidden_size, "], got ",
                    x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == scalar_type(layer.dtype()), "x: expected ", scalar_type(layer.dtype()),
                   " (the layer's compute dtype), got ", x.scalar_type());
  TORCH_CHECK_VALUE(index.dim() == 2 && index.size(0) == x.size(0), "index: expected shape [", x.size(0),
                    ", top_k], got ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index: expected int64, got ", index.scalar_type());
  TORCH_CHECK_VALUE(weights.sizes() == index.sizes(), "weights: expected the shape of index ", index.sizes(), ", got ",
                    weights.sizes());
  const at::ScalarType type = weights.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                   "weights: expected float32, bfloat16 or float16, got ", type);
  TORCH_CHECK_VALUE(index.numel() <= INT32_MAX, "index: expected at most 2^31 - 1 (token, slot) pairs");
  check_device(index, "index", x);
  check_device(weights, "weights", x);
  if (!x.is_cpu()) return;  // a GPU takes an index that is out of range as "not here"
  const Tensor contiguous = index.contiguous();
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] <= layer.num_experts(), "index: expected 0 to ", layer.num_experts(),
                      " (which means 'not here'), got ", values[i], " at position ", i);
  }
}

void check_grad_out(const Tensor& grad_out, const Tensor& x) {
  TORCH_CHECK_VALUE(grad_out.sizes() == x.sizes(), "grad_out: expected the shape of x ", x.sizes(), ", got ",
                    grad_out.sizes());
  TORCH_CHECK_TYPE(grad_out.scalar_type() == x.scalar_type(), "grad_out: expected ", x.scalar_type(), ", got ",
                   grad_out.scalar_type());
  check_device(grad_out, "grad_out", x);
}

}  // namespace

ExpertLayer& find_layer(int64_t handle) {
  ExpertLayer* layer = ExpertLayer::find(handle);
  TORCH_CHECK_VALUE(layer != nullptr, "handle: no expert layer has handle ", handle, " (was its module deleted?)");
  return *layer;
}

MicroBatches::MicroBatches(ExpertLayer& layer, Phase phase, at::TensorList x, at::TensorList index,
                           at::TensorList weights, std::optional<at::TensorList> grad_out) {
  TORCH_CHECK_VALUE(!x.empty(), "x: expected at least one micro-batch, got none");
  const auto check_count = [&](const char* name, const at::TensorList& list) {
    TORCH_CHECK_VALUE(list.size() == x.size(), name, ": expected ", x.size(), " micro-batches as in x, got ",
                      list.size());
  };
  check_count("index", index);
  check_count("weights", weights);
  if (grad_out) check_count("grad_out", *grad_out);
  const char* device = layer.sweep().pager().device().name();
  TORCH_CHECK_VALUE(x[0].is_cpu() == (std::string_view(device) == "cpu"),
                    "x: expected a tensor on the layer's device (", device, "), got one on ", x[0].device());
  int64_t num_pairs = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    check_device(x[i], "x", x[0]);
    check_micro_batch(layer, x[i], index[i], weights[i]);
    if (grad_out) check_grad_out((*grad_out)[i], x[i]);
    num_pairs += index[i].numel();
  }
  const std::vector<Tensor> indices = index.vec();
  const Routings routings = grad_out ? kept_routings(layer, indices) : sorted_routings(layer, indices, phase);
  for (size_t i = 0; i < x.size(); ++i) {
    batches_.push_back({x[i].contiguous(), weights[i].to(at::kFloat).contiguous(),
                        grad_out ? (*grad_out)[i].contiguous() : Tensor(), weights[i].scalar_type(), routings[i]});
  }
  dense_ = is_dense(num_pairs, layer.num_experts());
  for (int64_t expert = 0; expert < layer.num_experts(); ++expert) {
    int64_t most = 0;
    for (const MicroBatch& batch : batches_) most = std::max(most, batch.routing->tokens(expert));
    if (most > 0) experts_.push_back(expert);
    max_tokens_ = std::max(max_tokens_, most);
  }
}

}  // namespace usaf
