// The host's side of masked Adam that cuda/ and hip/ share: which kernel, how many rows a workgroup owns, whether
// accesses of four elements are aligned.
#pragma once
#include <stdexcept>

#include "../kernel_api.h"
#include "../numerics/adam_quad.h"
#include "../with_format.h"
#include "alignment.h"

namespace usaf::gpu {

// Whether every array's rows start at a multiple of four elements' bytes.
inline bool rows_are_aligned(const MaskedAdamArgs& a) {
  return a.cols % kQuad == 0 && is_multiple(a.grad, kQuad * element_size(a.grad_dtype)) &&
         is_multiple(a.master, kQuad * element_size(a.master_dtype)) && is_multiple(a.residual, kQuad) &&
         is_multiple(a.exp_avg, a.exp_avg_absmax ? kQuad : kQuad * 4) &&
         is_multiple(a.exp_avg_sq, a.exp_avg_sq_absmax ? kQuad : kQuad * 4);
}

// Workgroups, each for up to max_rows_per_group rows. `resident`: those that the device runs at once. As many as fill
// it a whole number of times: a few more would leave it nearly idle for as long as a full one takes.
inline unsigned adam_groups(int64_t num_rows, int64_t resident, int64_t max_rows_per_group, int64_t max_groups) {
  const int64_t most = resident * max_rows_per_group, waves = (num_rows + most - 1) / most;
  const int64_t rows = (num_rows + resident * waves - 1) / (resident * waves);
  const int64_t groups = (num_rows + rows - 1) / rows;
  if (groups > max_groups) throw std::invalid_argument("num_rows: too many rows for one launch");
  return static_cast<unsigned>(groups);
}

// body.operator()<kFormat, kMode, kMoments8>() with those of `args`; kMoments8: one of the moments or both are 8-bit.
template <class Body>
void with_adam_kernel(const MaskedAdamArgs& args, const Body& body) {
  check_codes(args.codes);
  const auto with_moments = [&]<Format kFormat, AdamMode kMode>() {
    args.exp_avg_absmax || args.exp_avg_sq_absmax ? body.template operator()<kFormat, kMode, true>()
                                                  : body.template operator()<kFormat, kMode, false>();
  };
  const auto with_mode = [&]<Format kFormat>() {
    switch (args.mode) {
      case AdamMode::master:
        return with_moments.template operator()<kFormat, AdamMode::master>();
      case AdamMode::in_place:
        return with_moments.template operator()<kFormat, AdamMode::in_place>();
      case AdamMode::residual:
        return with_moments.template operator()<kFormat, AdamMode::residual>();
      case AdamMode::eco:
        return with_moments.template operator()<kFormat, AdamMode::eco>();
    }
  };
  with_format(args.format, with_mode);
}

}  // namespace usaf::gpu
