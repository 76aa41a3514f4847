// One Adam/AdamW step of one weight, with decoupled weight decay.
//
// Formula (Kingma and Ba, arXiv 1412.6980; decay as in Loshchilov and Hutter, arXiv 1711.05101; the arrangement is that
// of torch.optim.AdamW), t = steps done including this one:
//   m = beta1 * m + (1 - beta1) * g
//   v = beta2 * v + (1 - beta2) * g * g
//   p = p * (1 - lr * weight_decay) - (lr / (1 - beta1^t)) * (m / (sqrt(v) / sqrt(1 - beta2^t) + eps))
//
// AdamScalars are computed in double and rounded to fp32 once; every operation on m, v and p is fp32. Only + - * / and
// sqrt are used (beta^t by squaring), which IEEE 754 rounds correctly: all backends give the same bits.
#pragma once
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace usaf {

struct AdamScalars {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float eps;
  float keep;              // 1 - lr * weight_decay
  float step_size;         // lr / (1 - beta1^t)
  float sqrt_correction2;  // sqrt(1 - beta2^t)
};

struct AdamState {
  float weight, exp_avg, exp_avg_sq;
};

USAF_HD double power_by_squaring(double base, int32_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = result * base;
    base = base * base;
  }
  return result;
}

// `step` counts this step, so it is at least 1.
USAF_HD AdamScalars adam_scalars(double lr, double beta1, double beta2, double eps, double weight_decay, int32_t step) {
  const double correction1 = 1.0 - power_by_squaring(beta1, step);
  const double correction2 = 1.0 - power_by_squaring(beta2, step);
  return AdamScalars{static_cast<float>(beta1),
                     static_cast<float>(1.0 - beta1),
                     static_cast<float>(beta2),
                     static_cast<float>(1.0 - beta2),
                     static_cast<float>(eps),
                     static_cast<float>(1.0 - lr * weight_decay),
                     static_cast<float>(lr / correction1),
                     static_cast<float>(sqrt(correction2))};
}

USAF_HD AdamState adam_step(const AdamScalars& s, AdamState state, float grad) {
  state.exp_avg = s.beta1 * state.exp_avg + s.one_minus_beta1 * grad;
  state.exp_avg_sq = s.beta2 * state.exp_avg_sq + s.one_minus_beta2 * (grad * grad);
  const float denominator = sqrtf(state.exp_avg_sq) / s.sqrt_correction2 + s.eps;
  state.weight = state.weight * s.keep - s.step_size * (state.exp_avg / denominator);
  return state;
}

}  // namespace usaf
