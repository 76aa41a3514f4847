// What rows of mode "residual" stand for, and the residual of given weights: for readers and for the first state. The
// step itself is masked_adam's.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../kernel_api.h"
#include "adam_block.h"
#include "codec_row.h"
#include "parallel.h"

namespace usaf::cpu {
namespace {

// One block of a row, decoded, with its residuals' units.
struct DecodedBlock {
  float weight[kBlockSize], unit[kBlockSize];
  int64_t count, element;
};

template <Format kFormat>
DecodedBlock decode(const ResidualArgs& args, int64_t row, int64_t start) {
  DecodedBlock block;
  block.count = std::min(kBlockSize, args.cols - start);
  block.element = row * args.cols + start;
  const uint8_t* codes = args.codes + row * code_bytes(kFormat, args.cols) + used_bytes(kFormat, start);
  const int64_t scale = row * num_blocks(kFormat, args.cols) + start / kBlockSize;
  const void* absmax = static_cast<const char*>(args.absmax) + scale * scale_bytes(kFormat);
  uint8_t padded[kBlockSize * sizeof(Bf16)] = {};
  std::memcpy(padded, codes, static_cast<size_t>(used_bytes(kFormat, block.count)));
  decode_block(kFormat, padded, absmax, block.count, block.weight);
  residual_units<kFormat>(padded, absmax, block.unit);
  return block;
}

template <Format kFormat, class Use>
void for_each_block(const ResidualArgs& args, const Use& use) {
  parallel_for(args.num_rows, args.cols, [&](int64_t row) {
    for (int64_t start = 0; start < args.cols; start += kBlockSize) use(decode<kFormat>(args, row, start));
  });
}

template <class Use>
void for_each_block(const ResidualArgs& args, const Use& use) {
  switch (args.format) {
    case Format::bf16:
      return for_each_block<Format::bf16>(args, use);
    case Format::nf4:
      return for_each_block<Format::nf4>(args, use);
    case Format::nf4_f16:
      return for_each_block<Format::nf4_f16>(args, use);
    case Format::int8:
      return for_each_block<Format::int8>(args, use);
    case Format::fp8:
      return for_each_block<Format::fp8>(args, use);
  }
  throw std::invalid_argument("format: unknown");
}

}  // namespace

void decode_residual(const ResidualArgs& args, void*) {
  for_each_block(args, [&](const DecodedBlock& block) {
    for (int64_t i = 0; i < block.count; ++i) {
      const auto residual = static_cast<float>(args.residual[block.element + i]);
      args.weight[block.element + i] = block.weight[i] + residual * block.unit[i];
    }
  });
}

void encode_residual(const ResidualArgs& args, void*) {
  for_each_block(args, [&](const DecodedBlock& block) {
    for (int64_t i = 0; i < block.count; ++i) {
      const float error = args.weight[block.element + i] - block.weight[i];
      args.residual[block.element + i] = static_cast<int8_t>(residual_encode(error, block.unit[i]));
    }
  });
}

}  // namespace usaf::cpu
