// For x86-64 machines with AVX-512 (F, BW, DQ, VL) and its bfloat16 instructions.

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header reads variables it leaves undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <utility>

#define HALFBYTE_ISA avx512
#define HALFBYTE_LANES 16
#define HALFBYTE_BFLOAT16_PAIRS
#define HALFBYTE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2"
#include "target.h"
// (after the target, so that the loops are compiled for it)
#include "adamw.h"
#include "attention.h"
#include "avx512.h"
#include "decode.h"
#include "elementwise.h"
#include "gemm.h"
#include "kernels.h"
#include "plain.h"
#include "softmax.h"

namespace halfbyte::avx512 {
namespace {

// The largest magnitude of one block; a NaN is larger than everything.
template <DType dtype>
float block_maximum(const typename Element<dtype>::Type* x, int64_t count) {
  const __m512i mask = _mm512_set1_epi32(int(kAbsMask));
  __m512i largest = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512i bits = _mm512_castps_si512(load16(x + i, Tag<dtype>{}));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, mask));
  }
  if (i < count) {
    const __m512i bits = _mm512_castps_si512(load16(x + i, first16(count - i), Tag<dtype>{}));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, mask));
  }
  return bits_to_float(_mm512_reduce_max_epu32(largest));
}

// Ranks 16 values among 15 midpoints by bisection: four comparisons, the table in a register.
class Ranker {
 public:
  explicit Ranker(const Ranks& ranks)
      : middle_(_mm512_set1_ps(ranks.midpoints[7])),
        quarters_(_mm512_maskz_loadu_ps(0x0fff, ranks.midpoints + 3)),
        eighths_(_mm512_maskz_loadu_ps(0x3fff, ranks.midpoints + 1)),
        odd_(_mm512_loadu_ps(ranks.midpoints)),
        codes_(_mm512_loadu_si512(ranks.codes)) {}

  __m512i operator()(__m512 y) const {
    __m512i rank = _mm512_maskz_set1_epi32(above(middle_, y), 8);
    rank = step(rank, quarters_, y, 4);
    rank = step(rank, eighths_, y, 2);
    rank = step(rank, odd_, y, 1);
    return _mm512_permutexvar_epi32(rank, codes_);
  }

 private:
  // Not `midpoint < y`: a NaN ranks last, as in torch.bucketize.
  static __mmask16 above(__m512 midpoint, __m512 y) {
    return _mm512_cmp_ps_mask(midpoint, y, _CMP_NGE_UQ);
  }
  static __m512i step(__m512i rank, __m512 midpoints, __m512 y, int bit) {
    const __m512 midpoint = _mm512_permutexvar_ps(rank, midpoints);
    return _mm512_mask_or_epi32(rank, above(midpoint, y), rank, _mm512_set1_epi32(bit));
  }

  __m512 middle_, quarters_, eighths_, odd_;
  __m512i codes_;
};

void quantize_4bit_fast(const void* x, DType dtype, int64_t numel, int64_t block_size,
                        const Ranks& ranks, int64_t begin, int64_t end, uint8_t* codes,
                        float* scales) {
  with_dtype(dtype, [&]<DType d>() {
    const Ranker ranker(ranks);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_size;
      const auto* source = static_cast<const typename Element<d>::Type*>(x) + first;
      const float scale = numel - first < block_size ? 0.0f : block_maximum<d>(source, block_size);
      // Short blocks, zeros, subnormal scales and NaN divide otherwise: the plain loop knows how.
      if (!(scale >= kSmallestNormal)) {
        quantize_4bit_plain<d>(x, numel, block_size, ranks, block, block + 1, codes, scales);
        continue;
      }
      scales[block] = scale;
      const __m512 reciprocal = _mm512_set1_ps(1.0f / scale);
      for (int64_t i = 0; i < block_size; i += 16) {
        const __m512i code = ranker(_mm512_mul_ps(load16(source + i, Tag<d>{}), reciprocal));
        // Of each 64-bit pair, the earlier code goes to the high nibble.
        const __m512i packed =
            _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + (first + i) / 2),
                         _mm512_cvtepi64_epi8(packed));
      }
    }
  });
}

// The largest float32 not above `r`. For a float32 x, r < x exactly when this is.
__m256 round_down(__m512d r) {
  return _mm512_cvt_roundpd_ps(r, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

// Boundaries of one block in float32, such that comparing with them is comparing exactly.
void boundaries(const Ranks8& ranks, float scale, float* out) {
  const __m512d factor = _mm512_set1_pd(double(scale));
  for (int i = 0; i < 256; i += 8) {
    _mm256_store_ps(out + i,
                    round_down(_mm512_mul_pd(_mm512_loadu_pd(ranks.midpoints + i), factor)));
  }
}

__m512i guess_bins(__m512 y) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i top = _mm512_set1_epi32(Ranks8::kBins - 1);
  __m512i bin = _mm512_srli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(int(kAbsMask))), 17);
  bin = _mm512_sub_epi32(bin, _mm512_set1_epi32(int(Ranks8::kFirst)));
  bin = _mm512_min_epi32(_mm512_max_epi32(bin, _mm512_setzero_si512()), top);
  const __m512i above = _mm512_add_epi32(bin, _mm512_set1_epi32(Ranks8::kBins));
  return _mm512_mask_sub_epi32(above, _mm512_movepi32_mask(bits), top, bin);
}

template <DType dtype>
void rank8_fast(const typename Element<dtype>::Type* x, int64_t count, const Ranks8& ranks,
                float scale, uint8_t* codes) {
  alignas(64) float bounds[256];
  boundaries(ranks, scale, bounds);
  const __m512 reciprocal = _mm512_set1_ps(1.0f / scale);
  const __m512i one = _mm512_set1_epi32(1);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first16(count - i);
    const __m512 value = load16(x + i, lanes, Tag<dtype>{});
    const __m512i bins = guess_bins(_mm512_mul_ps(value, reciprocal));
    __m512i rank =
        _mm512_and_si512(_mm512_i32gather_epi32(bins, ranks.guess, 1), _mm512_set1_epi32(0xff));
    for (__mmask16 below = 0xffff; below != 0;) {
      const __m512 bound = _mm512_i32gather_ps(rank, bounds, 4);
      below = _mm512_cmp_ps_mask(bound, value, _CMP_LT_OQ);
      rank = _mm512_mask_add_epi32(rank, below, rank, one);
    }
    _mm_mask_storeu_epi8(codes + i, lanes, _mm512_cvtepi32_epi8(rank));
  }
}

void quantize_8bit_fast(const void* x, DType dtype, int64_t numel, int64_t block_size,
                        const Ranks8& ranks, int64_t begin, int64_t end, uint8_t* codes,
                        float* scales) {
  constexpr int64_t kWorthBoundaries = 32;
  with_dtype(dtype, [&]<DType d>() {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_size;
      const int64_t count = smaller(block_size, numel - first);
      const auto* source = static_cast<const typename Element<d>::Type*>(x) + first;
      const float scale = block_maximum<d>(source, count);
      scales[block] = scale;
      if (guessable(scale) && count >= kWorthBoundaries) {
        rank8_fast<d>(source, count, ranks, scale, codes + first);
      } else {
        rank8_block<d>(x, first, count, ranks, scale, codes);
      }
    }
  });
}

void dequantize_8bit_fast(const uint8_t* codes, const float* table, const float* scales,
                          int64_t block_size, int64_t begin, int64_t end, DType dtype, void* out) {
  with_dtype(dtype, [&]<DType d>() {
    auto* target = static_cast<typename Element<d>::Type*>(out);
    for (int64_t i = begin; i < end;) {
      const int64_t block = i / block_size;
      const __m512 scale = _mm512_set1_ps(scales[block]);
      const int64_t stop = smaller(end, (block + 1) * block_size);
      for (; i < stop; i += 16) {
        const __mmask16 lanes = first16(stop - i);
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, codes + i));
        const __m512 value = _mm512_mul_ps(_mm512_i32gather_ps(code, table, 4), scale);
        store16(target + i, lanes, value, Tag<d>{});
      }
      i = stop;
    }
  });
}

void dequantize_4bit_fast(const Quantized& weight, int64_t begin, int64_t end, DType dtype,
                          void* out) {
  with_dtype(dtype, [&]<DType d>() {
    const BlockTable<d> table(weight.table);
    for_each_block<decode_scales_fast>(
        weight, begin, end, [&](float scale, int64_t from, int64_t to) {
          auto* target = static_cast<typename Element<d>::Type*>(out) + (from - begin);
          expand(weight.codes, table.scaled(scale), from, to, target);
        });
  });
}

}  // namespace
}  // namespace halfbyte::avx512

namespace halfbyte {

const Kernels kAvx512Bf16 = {
    .name = "avx512bf16",
    .quantize_4bit = avx512::quantize_4bit_fast,
    .dequantize_4bit = avx512::dequantize_4bit_fast,
    .quantize_8bit = avx512::quantize_8bit_fast,
    .dequantize_8bit = avx512::dequantize_8bit_fast,
    .adamw_moments = avx512::adamw_moments,
    .adamw_apply = avx512::adamw_apply,
    .attention_forward = avx512::attention_forward,
    .attention_delta = avx512::attention_delta,
    .attention_backward = avx512::attention_backward,
    .rms_norm = avx512::rms_norm,
    .rms_norm_backward = avx512::rms_norm_backward,
    .rotate = avx512::rotate,
    .gated = avx512::gated,
    .gated_backward = avx512::gated_backward,
    .prepared_bytes = avx512::prepared_bytes,
    .prepare = avx512::prepare,
    .linear = avx512::linear,
    .dense_rows = avx512::dense_rows,
    .single_query = avx512::single_query,
    .cross_entropy = avx512::cross_entropy,
    .gemm_pack_rows = avx512::gemm_pack_rows,
    .gemm_pack_columns = avx512::gemm_pack_columns,
    .gemm_block = avx512::gemm_block,
    .gemm_preferred = {false, false, false},
    .gemm_pairs = true,
    .few_rows = {256, 64, INT64_MAX},
};

}  // namespace halfbyte

#include "target_end.h"

#endif
