// Encode and decode rows. Threads share the rows. Every function exists once for each instruction set (isa.h): a plain
// loop compiled for it (codec_generic.h), or what codec_avx2.h and codec_avx512.h write by hand.
#include "../kernel_api.h"
#include "../with_format.h"
#include "codec_avx2.h"
#include "codec_avx512.h"
#include "codec_generic.h"
#include "codec_row.h"
#include "isa.h"
#include "parallel.h"
#include "stream.h"
#include "typed.h"

namespace usaf::cpu {
namespace {

// The functions of each instruction set. Rows end in what does not fill a block, which is left to the plain loops.
// kStream: what is written is aligned to 64 bytes and too large for the caches, so stores may go past them.
struct Plain {
  template <Format kFormat, bool kStream, class T>
  static void encode_row(const T* weight, int64_t cols, uint8_t* codes, void* absmax) {
    encode_row_generic<kFormat>(weight, cols, codes, absmax);
  }
  template <Format kFormat, bool kStream, class T>
  static void decode_row(const uint8_t* codes, const void* absmax, int64_t cols, T* out) {
    decode_row_generic<kFormat>(codes, absmax, cols, out);
  }
  template <Format kFormat>
  static void encode_stochastic(const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                                void* absmax) {
    encode_stochastic_generic<kFormat>(weight, count, random, codes, absmax);
  }
};

#ifdef USAF_HAS_ISA_LEVELS
struct Avx2 {
  template <Format kFormat, bool kStream, class T>
  USAF_AVX2 static void encode_row(const T* weight, int64_t cols, uint8_t* codes, void* absmax) {
    encode_row_generic<kFormat>(weight, cols, codes, absmax);
  }
  template <Format kFormat, bool kStream, class T>
  USAF_AVX2 static void decode_row(const uint8_t* codes, const void* absmax, int64_t cols, T* out) {
    if constexpr (is_nf4(kFormat)) {
      const int64_t blocks = cols / kBlockSize, done = blocks * kBlockSize;
      const auto* scales = static_cast<const typename BlockCodec<kFormat>::Scale*>(absmax);
      avx2::decode_nf4_blocks<kFormat, kStream>(codes, scales, blocks, out);
      decode_row_generic<kFormat>(codes + used_bytes(kFormat, done), scales + blocks, cols - done, out + done);
    } else {
      decode_row_generic<kFormat>(codes, absmax, cols, out);
    }
  }
  template <Format kFormat>
  USAF_AVX2 static void encode_stochastic(const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                                          void* absmax) {
    encode_stochastic_generic<kFormat>(weight, count, random, codes, absmax);
  }
};

struct Avx512 {
  template <Format kFormat, bool kStream, class T>
  USAF_AVX512 static void encode_row(const T* weight, int64_t cols, uint8_t* codes, void* absmax) {
    if constexpr (kFormat == Format::bf16) {
      auto* out = reinterpret_cast<Bf16*>(codes);
      const int64_t done = std::is_same_v<T, Bf16> && !kStream ? 0 : avx512::convert_groups<kStream>(weight, cols, out);
      convert(weight + done, cols - done, out + done);
    } else {
      const int64_t blocks = cols / kBlockSize, done = blocks * kBlockSize;
      auto* scales = static_cast<typename BlockCodec<kFormat>::Scale*>(absmax);
      avx512::encode_blocks<kFormat, kStream>(weight, blocks, codes, scales);
      encode_row_generic<kFormat>(weight + done, cols - done, codes + used_bytes(kFormat, done), scales + blocks);
    }
  }
  template <Format kFormat, bool kStream, class T>
  USAF_AVX512 static void decode_row(const uint8_t* codes, const void* absmax, int64_t cols, T* out) {
    if constexpr (kFormat == Format::bf16) {
      const auto* from = reinterpret_cast<const Bf16*>(codes);
      const int64_t done = std::is_same_v<T, Bf16> && !kStream ? 0 : avx512::convert_groups<kStream>(from, cols, out);
      convert(from + done, cols - done, out + done);
    } else {
      const int64_t blocks = cols / kBlockSize, done = blocks * kBlockSize;
      const auto* scales = static_cast<const typename BlockCodec<kFormat>::Scale*>(absmax);
      avx512::decode_blocks<kFormat, kStream>(codes, scales, blocks, out);
      decode_row_generic<kFormat>(codes + used_bytes(kFormat, done), scales + blocks, cols - done, out + done);
    }
  }
  template <Format kFormat>
  USAF_AVX512 static void encode_stochastic(const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                                            void* absmax) {
    encode_stochastic_generic<kFormat>(weight, count, random, codes, absmax);
  }
};
#endif

// body.operator()<Set>() with the functions of the instruction set in use.
template <class Body>
void with_isa(const Body& body) {
#ifdef USAF_HAS_ISA_LEVELS
  switch (isa()) {
    case Isa::avx512:
      return body.template operator()<Avx512>();
    case Isa::avx2:
      return body.template operator()<Avx2>();
    case Isa::plain:
      break;
  }
#endif
  body.template operator()<Plain>();
}

constexpr int64_t kCacheLine = 64;

int64_t absmax_bytes(Format format, int64_t cols) { return num_blocks(format, cols) * scale_bytes(format); }

void clear_padding(Format format, int64_t cols, uint8_t* codes) {
  const int64_t used = used_bytes(format, cols);
  std::memset(codes + used, 0, static_cast<size_t>(code_bytes(format, cols) - used));
}

}  // namespace

template <class T>
void decode_row(Format format, const uint8_t* codes, const void* absmax, int64_t cols, T* out) {
  with_format(format, [&]<Format kFormat>() {
    with_isa([&]<class Set>() { Set::template decode_row<kFormat, false>(codes, absmax, cols, out); });
  });
}

template <class T>
void encode_row(Format format, const T* weight, int64_t cols, uint8_t* codes, void* absmax) {
  with_format(format, [&]<Format kFormat>() {
    with_isa([&]<class Set>() { Set::template encode_row<kFormat, false>(weight, cols, codes, absmax); });
  });
  clear_padding(format, cols, codes);
}

void decode_rows_of(Format format, const EncodedRows& rows, int64_t num_rows, int64_t cols, Bf16* out,
                    int64_t out_stride) {
  with_format(format, [&]<Format kFormat>() {
    with_isa([&]<class Set>() {
      for (int64_t r = 0; r < num_rows; ++r) {
        const uint8_t* ahead = rows.codes + (r + rows.prefetch) * rows.code_stride;
        for (int64_t i = 0; i < used_bytes(kFormat, cols); i += kCacheLine) __builtin_prefetch(ahead + i, 0, 2);
        __builtin_prefetch(rows.absmax + (r + rows.prefetch) * rows.scale_stride, 0, 2);
        Set::template decode_row<kFormat, false>(rows.codes + r * rows.code_stride, rows.absmax + r * rows.scale_stride,
                                                 cols, out + r * out_stride);
      }
    });
  });
}

template void decode_row(Format, const uint8_t*, const void*, int64_t, float*);
template void decode_row(Format, const uint8_t*, const void*, int64_t, Bf16*);
template void decode_row(Format, const uint8_t*, const void*, int64_t, F16*);
template void encode_row(Format, const float*, int64_t, uint8_t*, void*);
template void encode_row(Format, const Bf16*, int64_t, uint8_t*, void*);
template void encode_row(Format, const F16*, int64_t, uint8_t*, void*);

void encode_block(Format format, const float* weight, int64_t count, const uint32_t* random, uint8_t* codes,
                  void* absmax) {
  with_format(format, [&]<Format kFormat>() {
    with_isa([&]<class Set>() {
      if (random) {
        Set::template encode_stochastic<kFormat>(weight, count, random, codes, absmax);
      } else {
        Set::template encode_row<kFormat, false>(weight, count, codes, absmax);
      }
    });
  });
}

void decode_block(Format format, const uint8_t* codes, const void* absmax, int64_t count, float* out) {
  decode_row(format, codes, absmax, count, out);
}

void encode_rows(const EncodeRowsArgs& args, void*) {
  const int64_t stride = code_bytes(args.format, args.cols), scale_stride = absmax_bytes(args.format, args.cols);
  const bool stream = may_stream(args.codes, args.num_rows, stride, stride, 1);
  auto* absmax = static_cast<uint8_t*>(args.absmax);
  with_type(args.weight_dtype, [&]<class T>(T) {
    with_format(args.format, [&]<Format kFormat>() {
      with_isa([&]<class Set>() {
        const T* weight = static_cast<const T*>(args.weight);
        const auto encode =
            stream ? Set::template encode_row<kFormat, true, T> : Set::template encode_row<kFormat, false, T>;
        parallel_for_runs(args.num_rows, args.cols, [&](int64_t first, int64_t last) {
          for (int64_t r = first; r < last; ++r) {
            const int64_t row = args.row_index ? args.row_index[r] : r;
            encode(weight + r * args.weight_stride, args.cols, args.codes + row * stride, absmax + row * scale_stride);
            clear_padding(args.format, args.cols, args.codes + row * stride);
          }
          if (stream) stream_fence();
        });
      });
    });
  });
}

void decode_rows(const DecodeRowsArgs& args, void*) {
  const int64_t stride = code_bytes(args.format, args.cols), scale_stride = absmax_bytes(args.format, args.cols);
  const bool stream = may_stream(args.out, args.num_rows, args.cols, args.out_stride, element_size(args.out_dtype));
  const auto* absmax = static_cast<const uint8_t*>(args.absmax);
  with_type(args.out_dtype, [&]<class T>(T) {
    with_format(args.format, [&]<Format kFormat>() {
      with_isa([&]<class Set>() {
        T* out = static_cast<T*>(args.out);
        const auto decode =
            stream ? Set::template decode_row<kFormat, true, T> : Set::template decode_row<kFormat, false, T>;
        parallel_for_runs(args.num_rows, args.cols, [&](int64_t first, int64_t last) {
          for (int64_t r = first; r < last; ++r) {
            const int64_t row = args.row_index ? args.row_index[r] : r;
            const int64_t target = args.out_index ? args.out_index[r] : r;
            decode(args.codes + row * stride, absmax + row * scale_stride, args.cols, out + target * args.out_stride);
          }
          if (stream) stream_fence();
        });
      });
    });
  });
}

}  // namespace usaf::cpu
