// One Adam/AdamW step of one weight, with decoupled weight decay.
//
// Formula (Kingma and Ba, arXiv 1412.6980; decay as in Loshchilov and Hutter, arXiv 1711.05101), t = steps done
// including this one:
//   m = beta1 * m + (1 - beta1) * g
//   v = beta2 * v + (1 - beta2) * g * g
//   p = p * (1 - lr * weight_decay) - (lr / (1 - beta1^t)) * m / d,   d = sqrt(v) / sqrt(1 - beta2^t) + eps
//
// AdamScalars are computed in double and rounded to fp32 once; every operation on m, v and p is fp32. Only + - * / and
// sqrt are used (beta^t by squaring), which IEEE 754 rounds correctly: all backends give the same bits.
//
// Eco: a step without anything beside the codes, whose rounding error lives on in m (Nikdan et al., "ECO", arXiv
// 2601.22101). Write a = lr / (1 - beta1^t) / d for a weight's effective step, k for the decay factor, q for what the
// codes hold, p for what was rounded to it and e = p - q. A full-precision weight would go p' = k p - a m'. From the
// codes we can only go p' = k q - a M', so M' must be m' - k e / a, where M' = beta1 M + (1 - beta1) g. Hence after the
// rounding M has to be m - k e / (a beta1), while before it it is m - k E / a, with E the error of the step before,
// which nobody kept. Errors change slowly (a weight rests on its code for many steps), so E is taken to be e:
//   M = M + (k / a) (1 - 1 / beta1) e
// (k, the decay, is our addition.) What the approximation drops is the step itself: rounding to nearest, a weight moves
// by (1 - beta1) of Adam's step while its code rests; stochastic rounding, whose errors have no drift, is the better
// half. A learning rate of 0, or one too small for k (1 - 1 / beta1) / lr to be an fp32 number, carries nothing; beta1
// = 0 has no memory to carry anything in and is refused.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace usaf {

// What stands beside the codes of a row that is trained.
enum class AdamMode : int32_t { master = 0, in_place = 1, residual = 2, eco = 3 };

struct AdamScalars {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float eps;
  float keep;                      // 1 - lr * weight_decay
  float step_size;                 // lr / (1 - beta1^t)
  float inverse_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
  float eco;                       // keep * (1 - 1 / beta1) / step_size, or 0
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
  const double step_size = lr / correction1, keep = 1.0 - lr * weight_decay;
  const double eco = keep * (1.0 - 1.0 / beta1) / step_size;
  return AdamScalars{static_cast<float>(beta1),
                     static_cast<float>(1.0 - beta1),
                     static_cast<float>(beta2),
                     static_cast<float>(1.0 - beta2),
                     static_cast<float>(eps),
                     static_cast<float>(keep),
                     static_cast<float>(step_size),
                     static_cast<float>(1.0 / sqrt(correction2)),
                     eco >= -FLT_MAX && eco <= FLT_MAX ? static_cast<float>(eco) : 0.0f};
}

// d of the formula.
USAF_HD float adam_denominator(const AdamScalars& s, float exp_avg_sq) {
  return sqrtf(exp_avg_sq) * s.inverse_sqrt_correction2 + s.eps;
}

USAF_HD AdamState adam_step(const AdamScalars& s, AdamState state, float grad) {
  state.exp_avg = s.beta1 * state.exp_avg + s.one_minus_beta1 * grad;
  state.exp_avg_sq = s.beta2 * state.exp_avg_sq + s.one_minus_beta2 * (grad * grad);
  state.weight = state.weight * s.keep - (s.step_size * state.exp_avg) / adam_denominator(s, state.exp_avg_sq);
  return state;
}

// exp_avg after an encode that erred by `error`, the stepped weight less the decoded one.
USAF_HD float eco_exp_avg(const AdamScalars& s, float exp_avg, float exp_avg_sq, float error) {
  return exp_avg + s.eco * error * adam_denominator(s, exp_avg_sq);
}

}  // namespace usaf
