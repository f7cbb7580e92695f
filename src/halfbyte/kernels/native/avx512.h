// AVX-512 pieces that quantization and multiplication share: loads, stores, table expansion.

#pragma once

#include "kernels.h"
#include "plain.h"

namespace halfbyte::avx512 {

// In avx512_linear.cpp; see `Kernels`.
int64_t prepared_bytes(const Quantized& weight, const LinearShape& shape, DType dtype);
void prepare(const Quantized& weight, const LinearShape& shape, DType dtype, const void* x,
             int64_t begin, int64_t end, void* prepared);
void linear(const Quantized& weight, const LinearShape& shape, DType dtype, const void* prepared,
            int64_t begin, int64_t end, const void* bias, void* y);

namespace {

template <DType dtype>
struct Tag {};

using Float32 = Tag<DType::kFloat32>;
using BFloat16 = Tag<DType::kBFloat16>;
using Float16 = Tag<DType::kFloat16>;

// Lanes 0 .. count - 1, of 16 or of 32.
__mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }
__mmask32 first32(int64_t count) {
  return count >= 32 ? 0xffffffffu : __mmask32((1u << count) - 1);
}

__m512 widen_bfloat16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

__m512 load16(const float* x, Float32) { return _mm512_loadu_ps(x); }
__m512 load16(const uint16_t* x, BFloat16) {
  return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
__m512 load16(const uint16_t* x, Float16) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
__m512 load16(const float* x, __mmask16 lanes, Float32) { return _mm512_maskz_loadu_ps(lanes, x); }
__m512 load16(const uint16_t* x, __mmask16 lanes, BFloat16) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16(lanes, x));
}
__m512 load16(const uint16_t* x, __mmask16 lanes, Float16) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x));
}

// Nearest bfloat16, ties to even. Integer arithmetic, because vcvtneps2bf16 flushes subnormals.
__m256i narrow_bfloat16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
}
__m256i narrow_float16(__m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

void store16(float* out, __mmask16 lanes, __m512 v, Float32) {
  _mm512_mask_storeu_ps(out, lanes, v);
}
void store16(uint16_t* out, __mmask16 lanes, __m512 v, BFloat16) {
  _mm256_mask_storeu_epi16(out, lanes, narrow_bfloat16(v));
}
void store16(uint16_t* out, __mmask16 lanes, __m512 v, Float16) {
  _mm256_mask_storeu_epi16(out, lanes, narrow_float16(v));
}

// As `decode_scales`, 16 at a time.
void decode_scales_fast(const Scales& scales, int64_t first, int64_t count, float* out) {
  if (scales.plain != nullptr) return decode_scales(scales, first, count, out);
  const __m512 offset = _mm512_set1_ps(scales.offset);
  for (int64_t i = 0; i < count;) {
    const int64_t group = (first + i) / scales.nested_block_size;
    const int64_t left = (group + 1) * scales.nested_block_size - (first + i);
    const int64_t stop = i + smaller(left, count - i);
    const __m512 nested = _mm512_set1_ps(scales.nested_scales[group]);
    for (; i < stop; i += 16) {
      const __mmask16 lanes = first16(stop - i);
      const __m512i code =
          _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, scales.codes + first + i));
      const __m512 value = _mm512_mul_ps(_mm512_i32gather_ps(code, scales.nested_table, 4), nested);
      _mm512_mask_storeu_ps(out + i, lanes, _mm512_add_ps(value, offset));
    }
    i = stop;
  }
}

// The 16 values of a codebook times the scale of a block, rounded to the output's dtype.
template <DType dtype>
class BlockTable;

template <>
class BlockTable<DType::kFloat32> {
 public:
  explicit BlockTable(const float* table) : table_(_mm512_loadu_ps(table)) {}
  __m512 scaled(float scale) const { return _mm512_mul_ps(table_, _mm512_set1_ps(scale)); }

 private:
  __m512 table_;
};

template <>
class BlockTable<DType::kFloat16> {
 public:
  explicit BlockTable(const float* table) : table_(_mm512_loadu_ps(table)) {}
  __m256i row(float scale) const {
    return narrow_float16(_mm512_mul_ps(table_, _mm512_set1_ps(scale)));
  }
  __m512i scaled(float scale) const { return _mm512_broadcast_i64x4(row(scale)); }

 private:
  __m512 table_;
};

template <>
class BlockTable<DType::kBFloat16> {
 public:
  explicit BlockTable(const float* table) : table_(_mm512_loadu_ps(table)) {
    float smallest = 0x1p126f;
    for (int i = 0; i < 16; ++i) {
      const float magnitude = bits_to_float(float_to_bits(table[i]) & kAbsMask);
      if (magnitude != 0.0f && magnitude < smallest) smallest = magnitude;
    }
    low_ = float_to_bits(0x1p-125f / smallest);
  }

  // Whether no product is subnormal, infinite by its scale, or NaN: then one instruction rounds.
  bool plain(float scale) const {
    return (float_to_bits(scale) & kAbsMask) - low_ < kInfinityBits - low_;
  }
  __m256i row(float scale) const {
    const __m512 products = _mm512_mul_ps(table_, _mm512_set1_ps(scale));
    if (__builtin_expect(plain(scale), 1)) return __m256i(_mm512_cvtneps_pbh(products));
    return narrow_bfloat16(products);
  }
  __m512i scaled(float scale) const { return _mm512_broadcast_i64x4(row(scale)); }

  // Whether all of these scales are plain.
  bool plain(const float* scales, int64_t count) const {
    const __m512i mask = _mm512_set1_epi32(int(kAbsMask)), low = _mm512_set1_epi32(int(low_));
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16) {
      // Lanes beyond the end hold the least scale that is plain.
      const __m512i some = _mm512_mask_loadu_epi32(low, first16(count - i), scales + i);
      const __m512i above = _mm512_sub_epi32(_mm512_and_si512(some, mask), low);
      largest = _mm512_max_epu32(largest, above);
    }
    return _mm512_reduce_max_epu32(largest) < kInfinityBits - low_;
  }

  // The tables of two blocks, that of the first in the lower half.
  __m512i pair(float first, float second) const {
    if (__builtin_expect(plain(first) & plain(second), 1)) return plain_pair(first, second);
    const __m512 low = _mm512_mul_ps(table_, _mm512_set1_ps(first));
    const __m512 high = _mm512_mul_ps(table_, _mm512_set1_ps(second));
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bfloat16(low)), narrow_bfloat16(high),
                              1);
  }
  __m512i plain_pair(float first, float second) const {
    const __m512 low = _mm512_mul_ps(table_, _mm512_set1_ps(first));
    const __m512 high = _mm512_mul_ps(table_, _mm512_set1_ps(second));
    return __m512i(_mm512_cvtne2ps_pbh(high, low));
  }

 private:
  __m512 table_;
  uint32_t low_;
};

// 32 elements of 16 bits. `table` holds the 16 values twice, because a shuffle reads 5 bits of
// each index and the fifth is a bit of the neighbouring nibble.
__m512i expand32(__m128i codes, __m512i table) {
  // Word j of lane l takes byte 4 l + j / 2 ...
  const __m512i spread = _mm512_set_epi64(int64_t(0x800f800f800e800e), int64_t(0x800d800d800c800c),
                                          int64_t(0x800b800b800a800a), int64_t(0x8009800980088008),
                                          int64_t(0x8007800780068006), int64_t(0x8005800580048004),
                                          int64_t(0x8003800380028002), int64_t(0x8001800180008000));
  // ... and even words its high nibble.
  const __m512i shifts = _mm512_set1_epi32(4);
  const __m512i bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), spread);
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(bytes, shifts), table);
}

// 16 elements of 32 bits, from 8 bytes. A shuffle reads 4 bits of each index.
__m512 expand16(__m128i codes, __m512 table) {
  const __m512i spread =
      _mm512_set_epi32(int(0x80808007), int(0x80808007), int(0x80808006), int(0x80808006),
                       int(0x80808005), int(0x80808005), int(0x80808004), int(0x80808004),
                       int(0x80808003), int(0x80808003), int(0x80808002), int(0x80808002),
                       int(0x80808001), int(0x80808001), int(0x80808000), int(0x80808000));
  const __m512i shifts = _mm512_set1_epi64(4);
  const __m512i bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), spread);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, shifts), table);
}

void store_first(uint16_t* out, __m512i table, int nibble) {
  const __m512i value = _mm512_permutexvar_epi16(_mm512_set1_epi16(int16_t(nibble)), table);
  *out = uint16_t(_mm_extract_epi16(_mm512_castsi512_si128(value), 0));
}
void store_first(float* out, __m512 table, int nibble) {
  *out = _mm512_cvtss_f32(_mm512_permutexvar_ps(_mm512_set1_epi32(nibble), table));
}

// Elements [begin, end) of one block. Reads no byte that holds none of them.
void expand(const uint8_t* codes, __m512i table, int64_t begin, int64_t end, uint16_t* out) {
  int64_t i = begin;
  if (i < end && i % 2 != 0) {
    store_first(out, table, codes[i / 2] & 15);
    ++i;
    ++out;
  }
  for (; i + 32 <= end; i += 32, out += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
    _mm512_storeu_si512(out, expand32(bytes, table));
  }
  if (i < end) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first16((end - i + 1) / 2), codes + i / 2);
    _mm512_mask_storeu_epi16(out, first32(end - i), expand32(bytes, table));
  }
}

void expand(const uint8_t* codes, __m512 table, int64_t begin, int64_t end, float* out) {
  int64_t i = begin;
  if (i < end && i % 2 != 0) {
    store_first(out, table, codes[i / 2] & 15);
    ++i;
    ++out;
  }
  for (; i + 16 <= end; i += 16, out += 16) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
    _mm512_storeu_ps(out, expand16(bytes, table));
  }
  if (i < end) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first16((end - i + 1) / 2), codes + i / 2);
    _mm512_mask_storeu_ps(out, first16(end - i), expand16(bytes, table));
  }
}

}  // namespace
}  // namespace halfbyte::avx512
