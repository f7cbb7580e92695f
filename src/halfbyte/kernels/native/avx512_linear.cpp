// Multiplication by 4-bit weights with AVX-512 and its bfloat16 dot products.
//
// bfloat16: `vdpbf16ps` multiplies the very bfloat16 weights that dequantizing would write. Where
// blocks and rows are cut at multiples of 64 elements, both operands are kept in an order that
// decodes without shuffling nibbles: 64 bytes are 32 words, and shifting the words gives four
// registers of table indices. A fifth bit of the index selects between the tables of two blocks. A
// sum does not mind the order of its terms.

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

constexpr int64_t kChunk = 64;         // elements that share a scale
constexpr int64_t kPair = 2 * kChunk;  // elements in the shuffled order
constexpr int64_t kAhead = 1024;       // bytes of codes to fetch before they are needed

// Element 4 w + kOrder[v] of either chunk of a pair is word w of its half of vector v.
constexpr int kOrder[4] = {1, 3, 0, 2};

__m256 halves_added(__m512 v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

void reduce4(const __m512* sums, float* out) {
  const __m256 low = _mm256_hadd_ps(halves_added(sums[0]), halves_added(sums[1]));
  const __m256 high = _mm256_hadd_ps(halves_added(sums[2]), halves_added(sums[3]));
  const __m256 both = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}

// The four vectors of a pair of chunks in shuffled order.
struct ChunkPair {
  ChunkPair(__m512i codes, __m512i tables) {
    const __m512i nibbles = _mm512_set1_epi8(15);
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
    // (a & nibbles) | second
    const __m512i low = _mm512_ternarylogic_epi64(codes, nibbles, second, 0xea);
    const __m512i high =
        _mm512_ternarylogic_epi64(_mm512_srli_epi16(codes, 4), nibbles, second, 0xea);
    // A shuffle of 32 words reads 5 bits of each index.
    vectors[0] = _mm512_permutexvar_epi16(low, tables);
    vectors[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 8), tables);
    vectors[2] = _mm512_permutexvar_epi16(high, tables);
    vectors[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 8), tables);
  }

  // A single chunk at the end of a row: the other half is zero.
  static ChunkPair half(const uint8_t* codes, __m256i table) {
    const __m512i zero = _mm512_setzero_si512();
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return ChunkPair(_mm512_inserti64x4(zero, bytes, 0), _mm512_inserti64x4(zero, table, 0));
  }

  __m512i vectors[4];
};

struct BFloat16Arithmetic {
  using Element = uint16_t;
  using Vector = __m512i;
  using Sum = __m512;
  static constexpr int kRows = 6, kColumns = 4, kStep = 32, kPad = 32;
  static constexpr int64_t kDepth = 4096, kPanel = 8;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Vector load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Sum multiply_add(Sum sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
  }
  static void reduce(const Sum* sums, float* out) { reduce4(sums, out); }
};

struct OrderedMicro : BFloat16Arithmetic {
  struct Decoder {
    explicit Decoder(const Quantized& w, int64_t) : weight(w), table(w.table) {}
    int64_t decode(int64_t begin, int64_t end, uint16_t* out) const {
      for_each_block<decode_scales_fast>(
          weight, begin, end, [&](float scale, int64_t from, int64_t to) {
            expand(weight.codes, table.scaled(scale), from, to, out + (from - begin));
          });
      return end - begin;
    }
    const Quantized& weight;
    const BlockTable<DType::kBFloat16> table;
  };
};

struct ShuffledMicro : BFloat16Arithmetic {
  static constexpr int kPad = kPair;

  struct Decoder {
    explicit Decoder(const Quantized& w, int64_t in_features)
        : weight(w), table(w.table), ahead(in_features / 2) {}

    // Whole chunks. Pieces of a row are too short for the processor to foresee the next row's.
    int64_t decode(int64_t begin, int64_t end, uint16_t* out) const {
      const int shift = __builtin_ctzll(uint64_t(weight.block_size));
      const int64_t block = begin >> shift;
      const int64_t blocks = ((end - 1) >> shift) - block + 1;
      float decoded[kDepth / kChunk + 16];
      const float* scales = weight.scales.plain + block;
      if (weight.scales.plain == nullptr) {
        decode_scales_fast(weight.scales, block, blocks, decoded);
        scales = decoded;
      }
      const bool plain = table.plain(scales, blocks);
      const uint8_t* codes = weight.codes + (begin >> 1);
      const int64_t offset = begin - (block << shift);
      const int64_t depth = end - begin;
      int64_t k = 0;
      for (; k + kPair <= depth; k += kPair, codes += kPair / 2) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T0);
        const float first = scales[(offset + k) >> shift];
        const float second = scales[(offset + k + kChunk) >> shift];
        const __m512i tables = plain ? table.plain_pair(first, second) : table.pair(first, second);
        store(ChunkPair(_mm512_loadu_si512(codes), tables), out + k);
      }
      if (k < depth) {
        store(ChunkPair::half(codes, table.row(scales[(offset + k) >> shift])), out + k);
        k += kPair;
      }
      return k;
    }

    static void store(const ChunkPair& pair, uint16_t* out) {
      for (int v = 0; v < 4; ++v) _mm512_storeu_si512(out + 32 * v, pair.vectors[v]);
    }

    const Quantized& weight;
    const BlockTable<DType::kBFloat16> table;
    const int64_t ahead;  // bytes of codes to the same piece of the next row
  };
};

template <DType dtype>
struct FloatMicro {
  using Element = float;
  using Vector = __m512;
  using Sum = __m512;
  static constexpr int kRows = 6, kColumns = 4, kStep = 16, kPad = 16;
  static constexpr int64_t kDepth = 1024, kPanel = 32;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static Sum multiply_add(Sum sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
  static void reduce(const Sum* sums, float* out) { reduce4(sums, out); }

  struct Decoder {
    explicit Decoder(const Quantized& w, int64_t) : weight(w), table(_mm512_loadu_ps(w.table)) {}
    int64_t decode(int64_t begin, int64_t end, float* out) const {
      for_each_block<decode_scales_fast>(
          weight, begin, end, [&](float scale, int64_t from, int64_t to) {
            __m512 values = _mm512_mul_ps(table, _mm512_set1_ps(scale));
            if constexpr (dtype == DType::kFloat16)
              values = _mm512_cvtph_ps(narrow_float16(values));
            expand(weight.codes, values, from, to, out + (from - begin));
          });
      return end - begin;
    }
    const Quantized& weight;
    const __m512 table;
  };
};

using InFloat = FloatLinear<FloatMicro>;

bool can_shuffle(const Quantized& weight, const LinearShape& shape) {
  return weight.block_size >= kChunk && shape.in_features % kChunk == 0;
}

int64_t bfloat16_stride(const Quantized& weight, const LinearShape& shape) {
  return round_up(shape.in_features,
                  can_shuffle(weight, shape) ? ShuffledMicro::kPad : OrderedMicro::kPad);
}

void shuffle_row(const uint16_t* x, int64_t count, uint16_t* out) {
  // Word w of vector v takes element 4 w + kOrder[v]: 32 words of two registers at a time.
  uint16_t places[2][32];
  for (int v = 0; v < 4; ++v) {
    for (int w = 0; w < 16; ++w) places[v / 2][16 * (v % 2) + w] = uint16_t(4 * w + kOrder[v]);
  }
  const __m512i order[2] = {_mm512_loadu_si512(places[0]), _mm512_loadu_si512(places[1])};
  for (int64_t i = 0; i < count; i += kPair, out += kPair) {
    const bool whole = i + kPair <= count;
    const __m512i zero = _mm512_setzero_si512();
    const __m512i source[4] = {_mm512_loadu_si512(x + i), _mm512_loadu_si512(x + i + 32),
                               whole ? _mm512_loadu_si512(x + i + 64) : zero,
                               whole ? _mm512_loadu_si512(x + i + 96) : zero};
    for (int v = 0; v < 4; v += 2) {
      const __m512i first = _mm512_permutex2var_epi16(source[0], order[v / 2], source[1]);
      const __m512i second = _mm512_permutex2var_epi16(source[2], order[v / 2], source[3]);
      _mm512_storeu_si512(out + 32 * v, _mm512_shuffle_i64x2(first, second, 0x44));
      _mm512_storeu_si512(out + 32 * v + 32, _mm512_shuffle_i64x2(first, second, 0xee));
    }
  }
}

// Scales of double quantization, looked up in the second-level table times a second-level scale:
// 256 products serve as many blocks as that scale does.
class NestedScales {
 public:
  NestedScales(const Scales& scales, const BlockTable<DType::kBFloat16>& table)
      : scales_(scales), table_(table) {}

  // Makes blocks from `block` to before the result readable.
  int64_t open(int64_t block) {
    if (block < begin_ || block >= end_) {
      const int64_t group = block / scales_.nested_block_size;
      begin_ = group * scales_.nested_block_size;
      end_ = begin_ + scales_.nested_block_size;
      const __m512 nested = _mm512_set1_ps(scales_.nested_scales[group]);
      const __m512 offset = _mm512_set1_ps(scales_.offset);
      for (int i = 0; i < 256; i += 16) {
        const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(scales_.nested_table + i), nested);
        _mm512_store_ps(values_ + i, _mm512_add_ps(products, offset));
      }
      plain_ = table_.plain(values_, 256);
    }
    return end_;
  }

  // Whether all that is readable rounds in one instruction.
  bool plain() const { return plain_; }
  float operator[](int64_t block) const { return values_[scales_.codes[block]]; }

 private:
  const Scales& scales_;
  const BlockTable<DType::kBFloat16>& table_;
  int64_t begin_ = 0, end_ = 0;
  bool plain_ = false;
  alignas(64) float values_[256];
};

// Decoding in registers pays while few rows use each weight.
constexpr int64_t kMaxDirectRows = 6;
constexpr int64_t kMinNestedBlock = 32;  // below, the products of NestedScales do not pay

// Sums of a row: four chains hide the latency of one row, two are enough for several.
template <int kRows>
struct DirectSums {
  static constexpr int kChains = kRows < 4 ? 4 : 2;

  DirectSums() {
    for (auto& row : sums) {
      for (auto& sum : row) sum = _mm512_setzero_ps();
    }
  }

  // `x` is at the pair in the first of the prepared rows.
  void add(const ChunkPair& pair, const uint16_t* x, int64_t stride) {
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < 4; ++v) {
        // The last operand of the instruction is the one that it can read from memory.
        const __m512i source = _mm512_loadu_si512(x + m * stride + 32 * v);
        sums[m][v % kChains] =
            _mm512_dpbf16_ps(sums[m][v % kChains], __m512bh(pair.vectors[v]), __m512bh(source));
      }
    }
  }

  float total(int m) const {
    __m512 sum = _mm512_add_ps(sums[m][0], sums[m][1]);
    if constexpr (kChains == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(sums[m][2], sums[m][3]));
    const __m256 half = halves_added(sum);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

  __m512 sums[kRows][kChains];
};

// Adds pairs of chunks [begin, end) of a row of the weight, whose codes and x begin where given; a
// chunk's scale is scale_of(chunk). Two at a time: what counts is how many instructions there are.
template <bool plain, int kRows, typename ScaleOf>
inline __attribute__((always_inline)) void add_pairs(const BlockTable<DType::kBFloat16>& table,
                                                     const uint8_t* codes, const uint16_t* x,
                                                     int64_t stride, int64_t begin, int64_t end,
                                                     ScaleOf scale_of, DirectSums<kRows>& sums) {
#pragma GCC unroll 2
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* source = codes + i * (kPair / 2);
    _mm_prefetch(reinterpret_cast<const char*>(source + kAhead), _MM_HINT_T0);
    const float first = scale_of(2 * i), second = scale_of(2 * i + 1);
    const __m512i tables = plain ? table.plain_pair(first, second) : table.pair(first, second);
    sums.add(ChunkPair(_mm512_loadu_si512(source), tables), x + i * kPair, stride);
  }
}

// Outputs [begin, end) for kRows rows, with no weight written anywhere. With `nested`, a second-
// level scale never ends inside a pair. A block is kChunk elements, or with `longer` more.
template <int kRows, bool nested, bool longer>
void multiply_direct(const Quantized& weight, const LinearShape& shape, const uint16_t* x,
                     int64_t stride, int64_t begin, int64_t end, const uint16_t* bias,
                     uint16_t* y) {
  static thread_local Scratch scale_memory;
  const int64_t depth = shape.in_features, pairs = depth / kPair;
  const int shift = longer ? __builtin_ctzll(uint64_t(weight.block_size)) : 6;
  static_assert(kChunk == 1 << 6);
  const BlockTable<DType::kBFloat16> table(weight.table);
  NestedScales nested_scales(weight.scales, table);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = n * depth, block = first >> shift;
    const uint8_t* codes = weight.codes + (first >> 1);
    DirectSums<kRows> sums;
    // The block of a chunk of this row, counted from `block`.
    const auto block_of = [&](int64_t chunk) {
      return longer ? ((first + chunk * kChunk) >> shift) - block : chunk;
    };
    if constexpr (nested) {
      const auto scale_of = [&](int64_t chunk) { return nested_scales[block + block_of(chunk)]; };
      for (int64_t i = 0; i < pairs;) {
        const int64_t readable = nested_scales.open((first + i * kPair) >> shift) << shift;
        const int64_t stop = smaller(pairs, (readable - first) / kPair);
        if (nested_scales.plain()) {
          add_pairs<true>(table, codes, x, stride, i, stop, scale_of, sums);
        } else {
          add_pairs<false>(table, codes, x, stride, i, stop, scale_of, sums);
        }
        i = stop;
      }
    } else {
      const int64_t blocks = ((first + depth - 1) >> shift) - block + 1;
      const float* scales = weight.scales.plain + block;
      if (weight.scales.plain == nullptr) {
        float* decoded = scale_memory.get<float>(blocks + 16);
        decode_scales_fast(weight.scales, block, blocks, decoded);
        scales = decoded;
      }
      const auto scale_of = [&](int64_t chunk) { return scales[block_of(chunk)]; };
      if (table.plain(scales, blocks)) {
        add_pairs<true>(table, codes, x, stride, 0, pairs, scale_of, sums);
      } else {
        add_pairs<false>(table, codes, x, stride, 0, pairs, scale_of, sums);
      }
      if (const int64_t k = pairs * kPair; k < depth) {
        sums.add(ChunkPair::half(codes + k / 2, table.row(scale_of(2 * pairs))), x + k, stride);
      }
    }
    for (int m = 0; m < kRows; ++m) {
      const float extra = bias == nullptr ? 0.0f : bfloat16_to_float(bias[n]);
      y[m * shape.out_features + n] = float_to_bfloat16(sums.total(m) + extra);
    }
  }
}

template <int kRows>
void multiply_direct_or_fewer(const Quantized& weight, const LinearShape& shape, const uint16_t* x,
                              int64_t stride, int64_t begin, int64_t end, const uint16_t* bias,
                              uint16_t* y) {
  if constexpr (kRows > 1) {
    if (shape.rows < kRows) {
      return multiply_direct_or_fewer<kRows - 1>(weight, shape, x, stride, begin, end, bias, y);
    }
  }
  const int64_t nested = weight.scales.nested_block_size;
  const bool pairs_stay_whole =
      nested * weight.block_size % kPair == 0 && shape.in_features % kPair == 0;
  const bool use_nested =
      weight.scales.plain == nullptr && nested >= kMinNestedBlock && pairs_stay_whole;
  const auto multiply_with = [&]<bool longer>() {
    if (use_nested) {
      multiply_direct<kRows, true, longer>(weight, shape, x, stride, begin, end, bias, y);
    } else {
      multiply_direct<kRows, false, longer>(weight, shape, x, stride, begin, end, bias, y);
    }
  };
  if (weight.block_size > kChunk) {
    multiply_with.template operator()<true>();
  } else {
    multiply_with.template operator()<false>();
  }
}

void run_shuffled(const Quantized& weight, const LinearShape& shape, const uint16_t* x,
                  int64_t begin, int64_t end, const void* bias, void* y) {
  const int64_t stride = bfloat16_stride(weight, shape);
  if (shape.rows <= kMaxDirectRows) {
    return multiply_direct_or_fewer<kMaxDirectRows>(weight, shape, x, stride, begin, end,
                                                    static_cast<const uint16_t*>(bias),
                                                    static_cast<uint16_t*>(y));
  }
  multiply<ShuffledMicro, DType::kBFloat16>(weight, shape, x, stride, begin, end, bias, y);
}

}  // namespace

int64_t prepared_bytes(const Quantized& weight, const LinearShape& shape, DType dtype) {
  if (dtype != DType::kBFloat16) return InFloat::prepared_bytes(weight, shape, dtype);
  return shape.rows * bfloat16_stride(weight, shape) * int64_t(sizeof(uint16_t));
}

void prepare(const Quantized& weight, const LinearShape& shape, DType dtype, const void* x,
             int64_t begin, int64_t end, void* prepared) {
  if (dtype != DType::kBFloat16) {
    return InFloat::prepare(weight, shape, dtype, x, begin, end, prepared);
  }
  const int64_t stride = bfloat16_stride(weight, shape);
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
  multiply<OrderedMicro, DType::kBFloat16>(weight, shape, x, bfloat16_stride(weight, shape), begin,
                                           end, bias, y);
}

}  // namespace halfbyte::avx512

#include "target_end.h"

#endif
