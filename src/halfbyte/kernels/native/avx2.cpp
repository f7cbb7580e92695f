// For x86-64 machines with AVX2, FMA and F16C.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdlib>
#include <memory>
#include <utility>

#define HALFBYTE_ISA avx2
#define HALFBYTE_LANES 8
#define HALFBYTE_TARGET "avx2,fma,f16c,bmi,bmi2"
#include "target.h"
// (after the target, so that the loops are compiled for it)
#include "adamw.h"
#include "attention.h"
#include "avx2_rows.h"
#include "decode.h"
#include "elementwise.h"
#include "gemm.h"
#include "matmul.h"
#include "softmax.h"

namespace halfbyte::avx2 {
namespace {

// Looks up 16-bit values by half: a byte shuffle each for the low and the high bytes.
class Expander16 {
 public:
  using Type = uint16_t;
  static constexpr int64_t kStep = 32, kPad = 32;

  explicit Expander16(const uint16_t* values) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 8));
    const __m128i low_byte = _mm_set1_epi16(0xff);
    low_ = _mm_packus_epi16(_mm_and_si128(first, low_byte), _mm_and_si128(second, low_byte));
    high_ = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
  }

  void operator()(const uint8_t* codes, uint16_t* out) const {
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
    const __m128i odd = _mm_and_si128(bytes, nibble);
    const __m128i ranks[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
    for (int half = 0; half < 2; ++half) {
      const __m128i low = _mm_shuffle_epi8(low_, ranks[half]);
      const __m128i high = _mm_shuffle_epi8(high_, ranks[half]);
      auto* target = reinterpret_cast<__m128i*>(out + 16 * half);
      _mm_storeu_si128(target, _mm_unpacklo_epi8(low, high));
      _mm_storeu_si128(target + 1, _mm_unpackhi_epi8(low, high));
    }
  }

 private:
  __m128i low_, high_;
};

// Looks up 32-bit values: a permutation each for the lower and the upper half of the table.
class Expander32 {
 public:
  using Type = float;
  static constexpr int64_t kStep = 8, kPad = 8;

  explicit Expander32(const float* values)
      : low_(_mm256_loadu_ps(values)), high_(_mm256_loadu_ps(values + 8)) {}

  void operator()(const uint8_t* codes, float* out) const {
    uint32_t word;
    __builtin_memcpy(&word, codes, sizeof word);
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256i ranks = _mm256_srlv_epi32(_mm256_set1_epi32(int(word)), shifts);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(ranks, 28));  // bit 3 to the sign
    const __m256 low = _mm256_permutevar8x32_ps(low_, ranks);
    const __m256 high = _mm256_permutevar8x32_ps(high_, ranks);
    _mm256_storeu_ps(out, _mm256_blendv_ps(low, high, upper));
  }

 private:
  __m256 low_, high_;
};

// Elements [begin, end) of one block.
template <typename Expander>
void expand(const uint8_t* codes, const typename Expander::Type* values, int64_t begin, int64_t end,
            typename Expander::Type* out) {
  const Expander step(values);
  int64_t i = begin;
  if (i < end && i % 2 != 0) {
    look_up(codes, values, i, i + 1, out);
    ++i;
  }
  for (; i + Expander::kStep <= end; i += Expander::kStep) step(codes + i / 2, out + (i - begin));
  look_up(codes, values, i, end, out + (i - begin));
}

void dequantize_4bit_fast(const Quantized& weight, int64_t begin, int64_t end, DType dtype,
                          void* out) {
  with_dtype(dtype, [&]<DType d>() {
    using T = typename Element<d>::Type;
    for_each_block(weight, begin, end, [&](float scale, int64_t from, int64_t to) {
      T values[16];
      block_table<d>(weight.table, scale, values);
      T* target = static_cast<T*>(out) + (from - begin);
      if constexpr (d == DType::kFloat32) {
        expand<Expander32>(weight.codes, values, from, to, target);
      } else {
        expand<Expander16>(weight.codes, values, from, to, target);
      }
    });
  });
}

template <DType dtype>
struct Micro {
  using Element = float;
  using Vector = __m256;
  using Sum = __m256;
  static constexpr int kRows = 3, kColumns = 4, kStep = 8, kPad = 8;
  static constexpr int64_t kDepth = 1024, kPanel = 16;

  static Sum zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static Sum multiply_add(Sum sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
  static void reduce(const Sum* sums, float* out) {
    const __m256 low = _mm256_hadd_ps(sums[0], sums[1]);
    const __m256 high = _mm256_hadd_ps(sums[2], sums[3]);
    const __m256 both = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
  }

  struct Decoder {
    explicit Decoder(const Quantized& w, int64_t) : weight(w) {}
    int64_t decode(int64_t begin, int64_t end, float* out) const {
      for_each_block(weight, begin, end, [&](float scale, int64_t from, int64_t to) {
        float values[16];
        rounded_table<dtype>(weight.table, scale, values);
        expand<Expander32>(weight.codes, values, from, to, out + (from - begin));
      });
      return end - begin;
    }
    const Quantized& weight;
  };
};

using Linear = FloatLinear<Micro>;

}  // namespace
}  // namespace halfbyte::avx2

namespace halfbyte {

const Kernels kAvx2 = {
    .name = "avx2",
    .quantize_4bit = avx2::quantize_4bit,
    .dequantize_4bit = avx2::dequantize_4bit_fast,
    .quantize_8bit = avx2::quantize_8bit,
    .dequantize_8bit = avx2::dequantize_8bit,
    .adamw_moments = avx2::adamw_moments,
    .adamw_apply = avx2::adamw_apply,
    .attention_forward = avx2::attention_forward,
    .attention_delta = avx2::attention_delta,
    .attention_backward = avx2::attention_backward,
    .rms_norm = avx2::rms_norm,
    .rms_norm_backward = avx2::rms_norm_backward,
    .rotate = avx2::rotate,
    .gated = avx2::gated,
    .gated_backward = avx2::gated_backward,
    .prepared_bytes = avx2::Linear::prepared_bytes,
    .prepare = avx2::Rows<avx2::Linear>::prepare,
    .linear = avx2::Rows<avx2::Linear>::run,
    .dense_rows = avx2::dense_rows,
    .single_query = avx2::single_query,
    .cross_entropy = avx2::cross_entropy,
    .gemm_pack_rows = avx2::gemm_pack_rows,
    .gemm_pack_columns = avx2::gemm_pack_columns,
    .gemm_block = avx2::gemm_block,
    .gemm_preferred = {false, true, true},
    .gemm_pairs = false,
    .few_rows = {128, 64, 128},
};

}  // namespace halfbyte

#include "target_end.h"

#endif
