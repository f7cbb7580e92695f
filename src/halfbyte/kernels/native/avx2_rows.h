// y = x W^T for few rows of x with AVX2: weights go from codes to products in registers, up to four
// rows at a time.
//
// 32 weights are looked up at once, as bytes: the 16 values of a block, rounded to the output's
// dtype, stand in registers by their low and their high bytes. What comes out is in an order of its
// own, so `prepare_rows` writes x in that order. Included by avx2.cpp only.

#pragma once

#include "lanes.h"
#include "matmul.h"

namespace halfbyte::avx2 {
namespace {

constexpr int kRowsTogether = 4;
constexpr int64_t kMostRows = 16;  // from here on, decoding panels once is faster: measured
constexpr int64_t kLookup = 32;    // weights that are looked up together

// The values of one block, as bytes, and lookups of 32 codes in them.
template <DType dtype>
class BlockBytes;

__m256i both_halves(__m256i v, bool upper) {
  return upper ? _mm256_permute2x128_si256(v, v, 0x11) : _mm256_permute2x128_si256(v, v, 0x00);
}

// From 16 values of 16 bits to their low bytes, twice, and their high bytes, twice.
void split_bytes(__m256i values, __m256i& low, __m256i& high) {
  const __m256i packed = _mm256_packus_epi16(_mm256_and_si256(values, _mm256_set1_epi16(0xff)),
                                             _mm256_srli_epi16(values, 8));
  const __m256i ordered = _mm256_permute4x64_epi64(packed, 0xd8);
  low = both_halves(ordered, false);
  high = both_halves(ordered, true);
}

// 16 bytes of codes: the earlier codes of the bytes in the lower half, the later in the upper.
__m256i split_codes(const uint8_t* codes) {
  const __m256i bytes =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m256i shifts = _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0);
  return _mm256_and_si256(_mm256_srlv_epi32(bytes, shifts), _mm256_set1_epi8(15));
}

template <DType dtype>
class BlockTable16 {
 public:
  explicit BlockTable16(const float* table) : table_(table) {}

 protected:
  // By plain loops, for scales that are not finite.
  __m256i values_of_any(float scale) const {
    uint16_t values[16];
    block_table<dtype>(table_, scale, values);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  }
  static bool finite(float scale) { return (float_to_bits(scale) & kAbsMask) < kInfinityBits; }

 private:
  const float* table_;
};

template <>
class BlockBytes<DType::kBFloat16> : BlockTable16<DType::kBFloat16> {
 public:
  // The place of feature i of 32 in the order of `look_up`.
  static int place(int i) { return 8 * (2 * (i / 16) + i / 2 % 2) + 4 * (i % 2) + i % 16 / 4; }

  explicit BlockBytes(const float* table)
      : BlockTable16(table),
        even_(_mm256_loadu2_m128(table + 8, table)),
        odd_(_mm256_loadu2_m128(table + 12, table + 4)) {}

  void set_scale(float scale) {
    if (__builtin_expect(!finite(scale), 0)) return split_bytes(values_of_any(scale), low_, high_);
    const __m256 factor = _mm256_set1_ps(scale);
    const __m256i values = _mm256_packus_epi32(rounded(_mm256_mul_ps(even_, factor)),
                                               rounded(_mm256_mul_ps(odd_, factor)));
    split_bytes(values, low_, high_);
  }

  void look_up(const uint8_t* codes, __m256* out) const {
    const __m256i ranks = split_codes(codes);
    const __m256i low = _mm256_shuffle_epi8(low_, ranks);
    const __m256i high = _mm256_shuffle_epi8(high_, ranks);
    const __m256i pairs[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    for (int half = 0; half < 2; ++half) {
      // A bfloat16 is the upper half of a float.
      out[2 * half] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs[half], 16));
      out[2 * half + 1] =
          _mm256_castsi256_ps(_mm256_and_si256(pairs[half], _mm256_set1_epi32(int(0xffff0000u))));
    }
  }

 private:
  // The nearest bfloat16 of each, ties to even, in the lower half.
  static __m256i rounded(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  }

  __m256 even_, odd_;  // values 0-3 and 8-11, 4-7 and 12-15: `packus` brings them in order
  __m256i low_, high_;
};

template <>
class BlockBytes<DType::kFloat16> : BlockTable16<DType::kFloat16> {
 public:
  static int place(int i) { return 8 * (2 * (i / 16) + i % 2) + i % 16 / 2; }

  explicit BlockBytes(const float* table)
      : BlockTable16(table), first_(_mm256_loadu_ps(table)), second_(_mm256_loadu_ps(table + 8)) {}

  void set_scale(float scale) {
    if (__builtin_expect(!finite(scale), 0)) return split_bytes(values_of_any(scale), low_, high_);
    const __m256 factor = _mm256_set1_ps(scale);
    split_bytes(_mm256_set_m128i(rounded(_mm256_mul_ps(second_, factor)),
                                 rounded(_mm256_mul_ps(first_, factor))),
                low_, high_);
  }

  void look_up(const uint8_t* codes, __m256* out) const {
    const __m256i ranks = split_codes(codes);
    const __m256i low = _mm256_shuffle_epi8(low_, ranks);
    const __m256i high = _mm256_shuffle_epi8(high_, ranks);
    const __m256i pairs[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    for (int half = 0; half < 2; ++half) {
      out[2 * half] = _mm256_cvtph_ps(_mm256_castsi256_si128(pairs[half]));
      out[2 * half + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(pairs[half], 1));
    }
  }

 private:
  static __m128i rounded(__m256 v) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  __m256 first_, second_;
  __m256i low_, high_;
};

template <>
class BlockBytes<DType::kFloat32> {
 public:
  static int place(int i) { return i; }

  explicit BlockBytes(const float* table)
      : first_(_mm256_loadu_ps(table)), second_(_mm256_loadu_ps(table + 8)) {}

  void set_scale(float scale) {
    const __m256 factor = _mm256_set1_ps(scale);
    low_ = _mm256_mul_ps(first_, factor);
    high_ = _mm256_mul_ps(second_, factor);
  }

  void look_up(const uint8_t* codes, __m256* out) const {
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int part = 0; part < 4; ++part) {
      uint32_t word;
      __builtin_memcpy(&word, codes + 4 * part, sizeof word);
      const __m256i ranks = _mm256_srlv_epi32(_mm256_set1_epi32(int(word)), shifts);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(ranks, 28));
      out[part] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_, ranks),
                                   _mm256_permutevar8x32_ps(high_, ranks), upper);
    }
  }

 private:
  __m256 first_, second_;
  __m256 low_, high_;
};

// Whether the kernels below may run: rows of the weight have to begin with a block.
bool by_rows(const Quantized& weight, const LinearShape& shape) {
  return shape.rows <= kMostRows && shape.in_features % weight.block_size == 0;
}

template <DType dtype>
void prepare_rows(const void* x, int64_t in_features, int64_t begin, int64_t end, float* out) {
  const auto* source = static_cast<const typename Element<dtype>::Type*>(x);
  int places[kLookup];
  for (int i = 0; i < kLookup; ++i) places[i] = BlockBytes<dtype>::place(i);
  for (int64_t k = begin * in_features; k < end * in_features; k += kLookup) {
    for (int i = 0; i < kLookup; ++i) out[k + places[i]] = Element<dtype>::load(source[k + i]);
  }
}

// Outputs [begin, end) of all kRows rows.
template <DType dtype, int kRows>
void multiply_rows(const Quantized& weight, const LinearShape& shape, const float* x, int64_t begin,
                   int64_t end, const void* bias, typename Element<dtype>::Type* y) {
  using Out = Element<dtype>;
  constexpr int kSums = kRows == 1 ? 4 : 2;  // so that products wait less for each other
  const int64_t in_features = shape.in_features;
  const auto* biases = static_cast<const typename Out::Type*>(bias);
  BlockBytes<dtype> values(weight.table);
  for (int64_t n = begin; n < end; ++n) {
    __m256 sums[kRows][kSums];
    for (auto& row : sums) {
      for (__m256& sum : row) sum = _mm256_setzero_ps();
    }
    const int64_t first = n * in_features;
    for_each_block(weight, first, first + in_features,
                   [&](float scale, int64_t from, int64_t to) __attribute__((always_inline)) {
                     values.set_scale(scale);
                     for (int64_t k = from; k < to; k += kLookup) {
                       __m256 looked_up[4];
                       values.look_up(weight.codes + k / 2, looked_up);
                       for (int m = 0; m < kRows; ++m) {
                         const float* row = x + m * in_features + (k - first);
                         for (int i = 0; i < 4; ++i) {
                           __m256& sum = sums[m][i % kSums];
                           sum = _mm256_fmadd_ps(looked_up[i], _mm256_loadu_ps(row + 8 * i), sum);
                         }
                       }
                     }
                   });
    const float offset = biases == nullptr ? 0.0f : Out::load(biases[n]);
    for (int m = 0; m < kRows; ++m) {
      __m256 total = _mm256_add_ps(sums[m][0], sums[m][1]);
      if constexpr (kSums == 4) {
        total = _mm256_add_ps(total, _mm256_add_ps(sums[m][2], sums[m][3]));
      }
      y[m * shape.out_features + n] = Out::store(sum_of(total) + offset);
    }
  }
}

// A tile of at most kRows rows.
template <DType dtype, int kRows = kRowsTogether>
void multiply_tile(const Quantized& weight, const LinearShape& shape, const float* x, int64_t begin,
                   int64_t end, const void* bias, typename Element<dtype>::Type* y) {
  if constexpr (kRows > 1) {
    if (shape.rows < kRows) {
      return multiply_tile<dtype, kRows - 1>(weight, shape, x, begin, end, bias, y);
    }
  }
  multiply_rows<dtype, kRows>(weight, shape, x, begin, end, bias, y);
}

// The few-row entries of `Kernels`: this way where it may run, through panels elsewhere.
template <typename Panels>
struct Rows {
  static void prepare(const Quantized& weight, const LinearShape& shape, DType dtype, const void* x,
                      int64_t begin, int64_t end, void* out) {
    if (!by_rows(weight, shape)) return Panels::prepare(weight, shape, dtype, x, begin, end, out);
    with_dtype(dtype, [&]<DType d>() {
      prepare_rows<d>(x, shape.in_features, begin, end, static_cast<float*>(out));
    });
  }
  static void run(const Quantized& weight, const LinearShape& shape, DType dtype, const void* x,
                  int64_t begin, int64_t end, const void* bias, void* y) {
    if (!by_rows(weight, shape)) {
      return Panels::run(weight, shape, dtype, x, begin, end, bias, y);
    }
    with_dtype(dtype, [&]<DType d>() {
      for (int64_t row = 0; row < shape.rows; row += kRowsTogether) {
        const LinearShape rest{shape.rows - row, shape.in_features, shape.out_features};
        multiply_tile<d>(weight, rest, static_cast<const float*>(x) + row * shape.in_features,
                         begin, end, bias,
                         static_cast<typename Element<d>::Type*>(y) + row * shape.out_features);
      }
    });
  }
};

}  // namespace
}  // namespace halfbyte::avx2
