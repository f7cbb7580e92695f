// Multiplication by 4-bit weights with AVX-512 and its bfloat16 dot products.
//
// bfloat16: `vdpbf16ps` multiplies the very bfloat16 weights that dequantizing would write. Where
// blocks and rows are cut at multiples of 64 elements, both operands are kept in an order that
// decodes without shuffling nibbles: 32 bytes are 16 words, and shifting the words by 0, 4, 8 and
// 12 bits gives four registers of table indices. A sum does not mind the order of its terms.

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header reads variables it leaves undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstdlib>
#include <memory>

#define HALFBYTE_ISA avx512
#define HALFBYTE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2"
#include "target.h"
// (after the target, so that the loops are compiled for it)
#include "avx512.h"
#include "matmul.h"

namespace halfbyte::avx512 {
namespace {

constexpr int64_t kChunk = 64;  // elements in the shuffled order

// Element 4 w + kOrder[v] of a chunk is word w of vector v.
constexpr int kOrder[4] = {1, 0, 3, 2};

float sum_of(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

__m256 halves_added(__m512 v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

void reduce4(const __m512* sums, float* out) {
  const __m256 low = _mm256_hadd_ps(halves_added(sums[0]), halves_added(sums[1]));
  const __m256 high = _mm256_hadd_ps(halves_added(sums[2]), halves_added(sums[3]));
  const __m256 both = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}

// The four vectors of a chunk in shuffled order.
struct Chunk {
  Chunk(const uint8_t* codes, __m256i table) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    // A shuffle of 16 words reads 4 bits of each index.
    vectors[0] = _mm256_permutexvar_epi16(words, table);
    vectors[1] = _mm256_permutexvar_epi16(_mm256_srli_epi16(words, 4), table);
    vectors[2] = _mm256_permutexvar_epi16(_mm256_srli_epi16(words, 8), table);
    vectors[3] = _mm256_permutexvar_epi16(_mm256_srli_epi16(words, 12), table);
  }
  __m256i vectors[4];
};

struct BFloat16Arithmetic {
  using Element = uint16_t;
  using Vector = __m512i;
  using Sum = __m512;
  static constexpr int kRows = 6, kColumns = 4, kStep = 32;
  static constexpr int64_t kDepth = 2048, kPanel = 32;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Vector load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Sum multiply_add(Sum sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
  }
  static void reduce(const Sum* sums, float* out) { reduce4(sums, out); }
};

struct OrderedMicro : BFloat16Arithmetic {
  struct Decoder {
    explicit Decoder(const Quantized& w) : weight(w), table(w.table) {}
    void decode(int64_t begin, int64_t end, uint16_t* out) const {
      for_each_block(weight, begin, end, [&](float scale, int64_t from, int64_t to) {
        expand(weight.codes, table.scaled(scale), from, to, out + (from - begin));
      });
    }
    const Quantized& weight;
    const BlockTable<DType::kBFloat16> table;
  };
};

struct ShuffledMicro : BFloat16Arithmetic {
  struct Decoder {
    explicit Decoder(const Quantized& w) : weight(w), table(w.table) {}
    void decode(int64_t begin, int64_t end, uint16_t* out) const {
      for_each_block(weight, begin, end, [&](float scale, int64_t from, int64_t to) {
        const __m256i values = table.row(scale);
        uint16_t* target = out + (from - begin);
        for (; from < to; from += kChunk, target += kChunk) {
          const Chunk chunk(weight.codes + from / 2, values);
          for (int v = 0; v < 4; ++v) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 16 * v), chunk.vectors[v]);
          }
        }
      });
    }
    const Quantized& weight;
    const BlockTable<DType::kBFloat16> table;
  };
};

template <DType dtype>
struct FloatMicro {
  using Element = float;
  using Vector = __m512;
  using Sum = __m512;
  static constexpr int kRows = 6, kColumns = 4, kStep = 16;
  static constexpr int64_t kDepth = 1024, kPanel = 32;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static Sum multiply_add(Sum sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
  static void reduce(const Sum* sums, float* out) { reduce4(sums, out); }

  struct Decoder {
    explicit Decoder(const Quantized& w) : weight(w), table(_mm512_loadu_ps(w.table)) {}
    void decode(int64_t begin, int64_t end, float* out) const {
      for_each_block(weight, begin, end, [&](float scale, int64_t from, int64_t to) {
        __m512 values = _mm512_mul_ps(table, _mm512_set1_ps(scale));
        if constexpr (dtype == DType::kFloat16) values = _mm512_cvtph_ps(narrow_float16(values));
        expand(weight.codes, values, from, to, out + (from - begin));
      });
    }
    const Quantized& weight;
    const __m512 table;
  };
};

using InFloat = FloatLinear<FloatMicro>;

bool can_shuffle(const Quantized& weight, const LinearShape& shape) {
  return weight.block_size >= kChunk && shape.in_features % kChunk == 0;
}

int64_t bfloat16_stride(const LinearShape& shape) {
  return round_up(shape.in_features, BFloat16Arithmetic::kStep);
}

void shuffle_row(const uint16_t* x, int64_t count, uint16_t* out) {
  uint16_t first[32], second[32];
  for (int v = 0; v < 2; ++v) {
    for (int w = 0; w < 16; ++w) {
      first[16 * v + w] = uint16_t(4 * w + kOrder[v]);
      second[16 * v + w] = uint16_t(4 * w + kOrder[v + 2]);
    }
  }
  const __m512i first_order = _mm512_loadu_si512(first);
  const __m512i second_order = _mm512_loadu_si512(second);
  for (int64_t i = 0; i < count; i += kChunk) {
    const __m512i low = _mm512_loadu_si512(x + i);
    const __m512i high = _mm512_loadu_si512(x + i + 32);
    _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(low, first_order, high));
    _mm512_storeu_si512(out + i + 32, _mm512_permutex2var_epi16(low, second_order, high));
  }
}

// Decoding in registers pays while few rows use each weight.
constexpr int64_t kMaxDirectRows = 4;

// Outputs [begin, end) for kRows rows, with no weight written anywhere.
template <int kRows>
void multiply_direct(const Quantized& weight, const LinearShape& shape, const uint16_t* x,
                     int64_t begin, int64_t end, const uint16_t* bias, uint16_t* y) {
  static thread_local Scratch scale_memory;
  const int64_t depth = shape.in_features;
  const int shift = __builtin_ctzll(uint64_t(weight.block_size));
  float* decoded = scale_memory.get<float>((depth >> shift) + 2);
  const BlockTable<DType::kBFloat16> table(weight.table);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = n * depth;
    const int64_t block = first >> shift;
    const float* scales = weight.scales.plain + block;
    if (weight.scales.plain == nullptr) {
      decode_scales(weight.scales, block, ((first + depth - 1) >> shift) - block + 1, decoded);
      scales = decoded;
    }
    const int64_t offset = first - (block << shift);
    __m256 sums[kRows][4];
    for (auto& row : sums) {
      for (auto& sum : row) sum = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < depth; k += kChunk) {
      const Chunk chunk(weight.codes + (first + k) / 2, table.row(scales[(offset + k) >> shift]));
      for (int m = 0; m < kRows; ++m) {
        for (int v = 0; v < 4; ++v) {
          const auto* source = reinterpret_cast<const __m256i*>(x + m * depth + k + 16 * v);
          sums[m][v] = _mm256_dpbf16_ps(sums[m][v], __m256bh(_mm256_loadu_si256(source)),
                                        __m256bh(chunk.vectors[v]));
        }
      }
    }
    for (int m = 0; m < kRows; ++m) {
      const __m256 total = _mm256_add_ps(_mm256_add_ps(sums[m][0], sums[m][1]),
                                         _mm256_add_ps(sums[m][2], sums[m][3]));
      const float extra = bias == nullptr ? 0.0f : bfloat16_to_float(bias[n]);
      y[m * shape.out_features + n] = float_to_bfloat16(sum_of(total) + extra);
    }
  }
}

void run_shuffled(const Quantized& weight, const LinearShape& shape, const uint16_t* x,
                  int64_t begin, int64_t end, const void* bias, void* y) {
  const auto* biases = static_cast<const uint16_t*>(bias);
  auto* target = static_cast<uint16_t*>(y);
  switch (shape.rows) {
    case 1:
      return multiply_direct<1>(weight, shape, x, begin, end, biases, target);
    case 2:
      return multiply_direct<2>(weight, shape, x, begin, end, biases, target);
    case 3:
      return multiply_direct<3>(weight, shape, x, begin, end, biases, target);
    case kMaxDirectRows:
      return multiply_direct<4>(weight, shape, x, begin, end, biases, target);
    default:
      return multiply<ShuffledMicro, DType::kBFloat16>(weight, shape, x, bfloat16_stride(shape),
                                                       begin, end, bias, y);
  }
}

}  // namespace

int64_t prepared_bytes(const Quantized& weight, const LinearShape& shape, DType dtype) {
  if (dtype != DType::kBFloat16) return InFloat::prepared_bytes(weight, shape, dtype);
  return shape.rows * bfloat16_stride(shape) * int64_t(sizeof(uint16_t));
}

void prepare(const Quantized& weight, const LinearShape& shape, DType dtype, const void* x,
             int64_t begin, int64_t end, void* prepared) {
  if (dtype != DType::kBFloat16) {
    return InFloat::prepare(weight, shape, dtype, x, begin, end, prepared);
  }
  const int64_t stride = bfloat16_stride(shape);
  const bool shuffled = can_shuffle(weight, shape);
  for (int64_t m = begin; m < end; ++m) {
    const uint16_t* row = static_cast<const uint16_t*>(x) + m * shape.in_features;
    uint16_t* target = static_cast<uint16_t*>(prepared) + m * stride;
    if (shuffled) {
      shuffle_row(row, shape.in_features, target);
    } else {
      for (int64_t i = 0; i < stride; ++i) target[i] = i < shape.in_features ? row[i] : 0;
    }
  }
}

void linear(const Quantized& weight, const LinearShape& shape, DType dtype, const void* prepared,
            int64_t begin, int64_t end, const void* bias, void* y) {
  if (dtype != DType::kBFloat16) {
    return InFloat::run(weight, shape, dtype, prepared, begin, end, bias, y);
  }
  const auto* x = static_cast<const uint16_t*>(prepared);
  if (can_shuffle(weight, shape)) return run_shuffled(weight, shape, x, begin, end, bias, y);
  multiply<OrderedMicro, DType::kBFloat16>(weight, shape, x, bfloat16_stride(shape), begin, end,
                                           bias, y);
}

}  // namespace halfbyte::avx512

#include "target_end.h"

#endif
