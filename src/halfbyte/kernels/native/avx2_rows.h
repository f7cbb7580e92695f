// y = x W^T for few rows of x with AVX2: weights go from codes to products in registers, up to four
// rows at a time.
//
// The 16 values of a block, rounded to the output's dtype, are kept by their bytes: a plane holds
// one byte of each, and one shuffle looks up that byte of 32 weights. Planes of many blocks are
// made before the first is used: the chain from a scale to a product is long, and those of
// different blocks overlap only where they stand close together. Weights come out in an order of
// their own, so `prepare_rows` writes x in that order. Included by avx2.cpp only.

#pragma once

#include "lanes.h"
#include "matmul.h"

namespace halfbyte::avx2 {
namespace {

constexpr int kRowsTogether = 4;
constexpr int64_t kMostRows = 16;  // from here on, decoding panels once is faster: measured
constexpr int64_t kLookup = 64;    // weights that are looked up together
constexpr int64_t kPlaneBlocks = 64;
constexpr int64_t kAhead = 2048;  // bytes of codes that are on their way from memory

// The values of two blocks, one in the lower halves of the registers, one in the upper: values 4i
// to 4i + 3 in the i-th register.
using BlockPair = __m256[4];

// Floats, and float16 as the floats that they are: four planes. `look_up` takes 32 codes, one a
// byte; `place` is where it puts the one of byte j.
template <DType dtype>
struct Planes {
  static constexpr int kCount = 4;

  static void make(const BlockPair& values, __m256i* planes) {
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                           0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i by_byte[4];  // four bytes each of byte 0, byte 1, ...
    for (int i = 0; i < 4; ++i) {
      by_byte[i] = _mm256_shuffle_epi8(_mm256_castps_si256(rounded(values[i])), bytes);
    }
    const __m256i low[2] = {_mm256_unpacklo_epi32(by_byte[0], by_byte[1]),
                            _mm256_unpacklo_epi32(by_byte[2], by_byte[3])};
    const __m256i high[2] = {_mm256_unpackhi_epi32(by_byte[0], by_byte[1]),
                             _mm256_unpackhi_epi32(by_byte[2], by_byte[3])};
    planes[0] = _mm256_unpacklo_epi64(low[0], low[1]);
    planes[1] = _mm256_unpackhi_epi64(low[0], low[1]);
    planes[2] = _mm256_unpacklo_epi64(high[0], high[1]);
    planes[3] = _mm256_unpackhi_epi64(high[0], high[1]);
  }

  static int place(int j) { return 8 * (j % 16 / 4) + 4 * (j / 16) + j % 4; }

  static void look_up(const __m256i* planes, __m256i codes, __m256* out) {
    __m256i bytes[4];
    for (int i = 0; i < 4; ++i) bytes[i] = _mm256_shuffle_epi8(planes[i], codes);
    const __m256i low[2] = {_mm256_unpacklo_epi8(bytes[0], bytes[1]),
                            _mm256_unpackhi_epi8(bytes[0], bytes[1])};
    const __m256i high[2] = {_mm256_unpacklo_epi8(bytes[2], bytes[3]),
                             _mm256_unpackhi_epi8(bytes[2], bytes[3])};
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
      out[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
    }
  }

 private:
  static __m256 rounded(__m256 v) {
    if constexpr (dtype == DType::kFloat32) return v;
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

// A bfloat16 is the upper half of a float: two planes.
template <>
struct Planes<DType::kBFloat16> {
  static constexpr int kCount = 2;

  static void make(const BlockPair& values, __m256i* planes) {
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15,  //
                                           0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
    __m256i by_byte[2];  // eight low bytes, eight high ones
    for (int i = 0; i < 2; ++i) {
      const __m256i even = _mm256_srli_epi32(rounded(values[2 * i]), 16);
      const __m256i both = _mm256_blend_epi16(even, rounded(values[2 * i + 1]), 0xaa);
      by_byte[i] = _mm256_shuffle_epi8(both, bytes);
    }
    planes[0] = _mm256_unpacklo_epi64(by_byte[0], by_byte[1]);
    planes[1] = _mm256_unpackhi_epi64(by_byte[0], by_byte[1]);
  }

  static int place(int j) { return 8 * (2 * (j % 16 / 8) + j % 2) + 4 * (j / 16) + j % 8 / 2; }

  static void look_up(const __m256i* planes, __m256i codes, __m256* out) {
    const __m256i low = _mm256_shuffle_epi8(planes[0], codes);
    const __m256i high = _mm256_shuffle_epi8(planes[1], codes);
    const __m256i words[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(words[i], 16));
      out[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(words[i], upper));
    }
  }

 private:
  // The nearest bfloat16 of each, ties to even, in the upper half; NaN has to be 0x7fc00000.
  static __m256i rounded(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }
};

// Planes of blocks [first, first + count) of a weight, at most kPlaneBlocks.
template <DType dtype>
class BlockPlanes {
 public:
  using P = Planes<dtype>;

  void make(const Quantized& weight, int64_t first, int64_t count) {
    float scales[kPlaneBlocks + 1];
    decode_scales(weight.scales, first, count, scales);
    for (int64_t i = 0; i < count; ++i) {
      scales[i] = scales[i] == scales[i] ? scales[i] : __builtin_nanf("");
    }
    scales[count] = 0.0f;  // of no block, where their number is odd
    const __m256i own_scale = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (int64_t i = 0; i < count; i += 2) {
      double two;
      __builtin_memcpy(&two, scales + i, sizeof two);
      const __m256 factor = _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(two)), own_scale);
      BlockPair values;
      for (int part = 0; part < 4; ++part) {
        const __m256 quarter =
            _mm256_broadcast_ps(reinterpret_cast<const __m128*>(weight.table + 4 * part));
        values[part] = _mm256_mul_ps(quarter, factor);
      }
      P::make(values, planes_ + i / 2 * P::kCount);
    }
  }

  // Those of the i-th block, in both halves.
  void load(int64_t i, __m256i* planes) const {
    for (int plane = 0; plane < P::kCount; ++plane) {
      const auto* both = reinterpret_cast<const __m128i*>(planes_ + i / 2 * P::kCount + plane);
      planes[plane] = _mm256_broadcastsi128_si256(_mm_load_si128(both + i % 2));
    }
  }

 private:
  __m256i planes_[kPlaneBlocks / 2 * P::kCount];
};

// Whether the kernels below may run: rows of the weight have to begin with a block.
bool by_rows(const Quantized& weight, const LinearShape& shape) {
  return shape.rows <= kMostRows && weight.block_size % kLookup == 0 &&
         shape.in_features % weight.block_size == 0;
}

// Rows that are multiplied together stand side by side, kLookup features of each: all that a lookup
// is multiplied by is in one place. The earlier codes of its 32 bytes come first, then the later.
template <DType dtype>
void prepare_rows(const void* x, const LinearShape& shape, int64_t begin, int64_t end, float* out) {
  int places[kLookup];
  for (int i = 0; i < kLookup; ++i) {
    places[i] = kLookup / 2 * (i % 2) + Planes<dtype>::place(i / 2);
  }
  const int64_t in_features = shape.in_features;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row / kRowsTogether * kRowsTogether;
    const int64_t together = smaller(kRowsTogether, shape.rows - first);
    const auto* source = static_cast<const typename Element<dtype>::Type*>(x) + row * in_features;
    float* target = out + first * in_features + (row - first) * kLookup;
    for (int64_t k = 0; k < in_features; k += kLookup) {
      for (int i = 0; i < kLookup; ++i) {
        target[k * together + places[i]] = Element<dtype>::load(source[k + i]);
      }
    }
  }
}

// Outputs [begin, end) of all kRows rows.
template <DType dtype, int kRows>
void multiply_rows(const Quantized& weight, const LinearShape& shape, const float* x, int64_t begin,
                   int64_t end, const void* bias, typename Element<dtype>::Type* y) {
  using Out = Element<dtype>;
  constexpr int kSums = kRows == 1 ? 4 : 2;  // so that products wait less for each other
  const int64_t in_features = shape.in_features;
  const int64_t row_blocks = in_features / weight.block_size;
  const auto* biases = static_cast<const typename Out::Type*>(bias);
  const __m256i nibble = _mm256_set1_epi8(15);
  BlockPlanes<dtype> planes;
  for (int64_t n = begin; n < end; ++n) {
    __m256 sums[kRows][kSums];
    for (auto& row : sums) {
      for (__m256& sum : row) sum = _mm256_setzero_ps();
    }
    const uint8_t* codes = weight.codes + n * in_features / 2;
    const float* columns = x;
    for (int64_t first = 0; first < row_blocks; first += kPlaneBlocks) {
      const int64_t count = smaller(kPlaneBlocks, row_blocks - first);
      planes.make(weight, n * row_blocks + first, count);
      for (int64_t block = 0; block < count; ++block) {
        __m256i values[Planes<dtype>::kCount];
        planes.load(block, values);
        for (int64_t k = 0; k < weight.block_size; k += kLookup) {
          _mm_prefetch(codes + kAhead, _MM_HINT_T0);
          const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
          const __m256i nibbles[2] = {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble),
                                      _mm256_and_si256(bytes, nibble)};
          for (int half = 0; half < 2; ++half) {
            __m256 looked_up[4];
            Planes<dtype>::look_up(values, nibbles[half], looked_up);
            for (int m = 0; m < kRows; ++m) {
              const float* row = columns + m * kLookup + half * kLookup / 2;
              for (int i = 0; i < 4; ++i) {
                __m256& sum = sums[m][i % kSums];
                sum = _mm256_fmadd_ps(looked_up[i], _mm256_loadu_ps(row + 8 * i), sum);
              }
            }
          }
          codes += kLookup / 2;
          columns += kRows * kLookup;
        }
      }
    }
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
    with_dtype(dtype,
               [&]<DType d>() { prepare_rows<d>(x, shape, begin, end, static_cast<float*>(out)); });
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
