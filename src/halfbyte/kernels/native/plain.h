// Bodies in plain loops that a compiler vectorises, for any instruction set.
//
// Included once in the namespace of each instruction set that has nothing faster, and by the
// faster ones for their slow paths.

#pragma once

#include "types.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

template <DType dtype>
struct Element;

template <>
struct Element<DType::kFloat32> {
  using Type = float;
  static float load(float v) { return v; }
  static float store(float v) { return v; }
};

template <>
struct Element<DType::kBFloat16> {
  using Type = uint16_t;
  static float load(uint16_t v) { return bfloat16_to_float(v); }
  static uint16_t store(float v) { return float_to_bfloat16(v); }
};

template <>
struct Element<DType::kFloat16> {
  using Type = uint16_t;
  static float load(uint16_t v) { return float16_to_float(v); }
  static uint16_t store(float v) { return float_to_float16(v); }
};

template <typename Function>
void with_dtype(DType dtype, Function function) {
  if (dtype == DType::kFloat32) {
    function.template operator()<DType::kFloat32>();
  } else if (dtype == DType::kBFloat16) {
    function.template operator()<DType::kBFloat16>();
  } else {
    function.template operator()<DType::kFloat16>();
  }
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <DType dtype>
void load_floats(const void* x, int64_t first, int64_t count, float* y) {
  const auto* source = static_cast<const typename Element<dtype>::Type*>(x) + first;
  for (int64_t i = 0; i < count; ++i) y[i] = Element<dtype>::load(source[i]);
}

// As unsigned integers, so that a NaN (above infinity there) is the largest of all.
float absolute_maximum(const float* y, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = float_to_bits(y[i]) & kAbsMask;
    largest = magnitude > largest ? magnitude : largest;
  }
  return bits_to_float(largest);
}

// Scales [first, first + count) in float32. Two roundings when they are double-quantized.
void decode_scales(const Scales& scales, int64_t first, int64_t count, float* out) {
  if (scales.plain != nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = scales.plain[first + i];
    return;
  }
  for (int64_t i = 0; i < count;) {
    const int64_t group = (first + i) / scales.nested_block_size;
    const int64_t left = (group + 1) * scales.nested_block_size - (first + i);
    const int64_t stop = i + smaller(left, count - i);
    const float nested = scales.nested_scales[group];
    for (; i < stop; ++i) {
      out[i] = scales.nested_table[scales.codes[first + i]] * nested + scales.offset;
    }
  }
}

// The 16 values of a block, rounded to the output's dtype.
template <DType dtype>
void block_table(const float* table, float scale, typename Element<dtype>::Type* out) {
  for (int i = 0; i < 16; ++i) out[i] = Element<dtype>::store(table[i] * scale);
}

// Elements [begin, end) of one block.
template <typename T>
void look_up(const uint8_t* codes, const T* values, int64_t begin, int64_t end, T* out) {
  int64_t i = begin;
  if (i < end && i % 2 != 0) {
    *out++ = values[codes[i / 2] & 15];
    ++i;
  }
  for (; i + 1 < end; i += 2, out += 2) {
    const uint8_t byte = codes[i / 2];
    out[0] = values[byte >> 4];
    out[1] = values[byte & 15];
  }
  if (i < end) *out = values[codes[i / 2] >> 4];
}

// Calls function(scale, from, to) for every block that [begin, end) touches.
template <auto kDecodeScales = decode_scales, typename Function>
void for_each_block(const Quantized& weight, int64_t begin, int64_t end, Function function) {
  constexpr int64_t kScales = 64;
  float scales[kScales];
  const int64_t last = end > begin ? (end - 1) / weight.block_size + 1 : 0;
  for (int64_t block = begin / weight.block_size; block < last; block += kScales) {
    const int64_t count = smaller(kScales, last - block);
    kDecodeScales(weight.scales, block, count, scales);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = (block + i) * weight.block_size;
      const int64_t from = first < begin ? begin : first;
      function(scales[i], from, smaller(end, first + weight.block_size));
    }
  }
}

void dequantize_4bit(const Quantized& weight, int64_t begin, int64_t end, DType dtype, void* out) {
  with_dtype(dtype, [&]<DType d>() {
    using T = typename Element<d>::Type;
    for_each_block(weight, begin, end, [&](float scale, int64_t from, int64_t to) {
      T values[16];
      block_table<d>(weight.table, scale, values);
      look_up(weight.codes, values, from, to, static_cast<T*>(out) + (from - begin));
    });
  });
}

// Divides a block by its scale, in place, as bitsandbytes does.
void normalise(float* y, int64_t count, float scale, bool full) {
  if (full && scale >= kSmallestNormal) {
    const float reciprocal = 1.0f / scale;
    for (int64_t i = 0; i < count; ++i) y[i] *= reciprocal;
  } else if (scale != 0.0f) {
    for (int64_t i = 0; i < count; ++i) y[i] /= scale;
  }
}

template <DType dtype>
void quantize_4bit_plain(const void* x, int64_t numel, int64_t block_size, const Ranks& ranks,
                         int64_t begin, int64_t end, uint8_t* codes, float* scales) {
  float y[kMaxBlockSize];
  uint8_t code[kMaxBlockSize];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * block_size;
    const int64_t count = smaller(block_size, numel - first);
    load_floats<dtype>(x, first, count, y);
    const bool full = count == block_size;
    float scale = absolute_maximum(y, count);
    if (!full && scale == 0.0f) scale = kEmptyTailScale;
    scales[block] = scale;
    const int64_t padded = count + count % 2;
    if (padded > count) y[count] = 0.0f;
    normalise(y, padded, scale, full);
    for (int64_t i = 0; i < padded; ++i) {
      uint32_t rank = 0;
      // Not `midpoint < y`: a NaN ranks last, as in torch.bucketize.
      for (int j = 0; j < 15; ++j) rank += !(ranks.midpoints[j] >= y[i]);
      code[i] = uint8_t(ranks.codes[rank]);
    }
    uint8_t* packed = codes + first / 2;
    for (int64_t i = 0; i < padded / 2; ++i) {
      packed[i] = uint8_t(code[2 * i] << 4 | code[2 * i + 1]);
    }
  }
}

void quantize_4bit(const void* x, DType dtype, int64_t numel, int64_t block_size,
                   const Ranks& ranks, int64_t begin, int64_t end, uint8_t* codes, float* scales) {
  with_dtype(dtype, [&]<DType d>() {
    quantize_4bit_plain<d>(x, numel, block_size, ranks, begin, end, codes, scales);
  });
}

// Scales whose reciprocal is normal and accurate: the guess from x * (1 / scale) holds.
bool guessable(float scale) { return scale >= kSmallestNormal && scale <= 0x1p125f; }

int guess_bin(float y) {
  const uint32_t bits = float_to_bits(y);
  const int bin = int((bits & kAbsMask) >> 17) - int(Ranks8::kFirst);
  const int clamped = bin < 0 ? 0 : (bin < Ranks8::kBins ? bin : Ranks8::kBins - 1);
  return bits >> 31 ? Ranks8::kBins - 1 - clamped : Ranks8::kBins + clamped;
}

// The number of boundaries midpoint * scale below x, exactly: the products are exact in float64.
uint8_t rank8(const Ranks8& ranks, double scale, double x, int at_least) {
  int rank = at_least;
  while (rank < 255 && !(ranks.midpoints[rank] * scale >= x)) ++rank;
  return uint8_t(rank);
}

// The same by bisection, for scales without a guess; a NaN ranks last, as in torch.searchsorted.
uint8_t rank8_bisect(const Ranks8& ranks, double scale, double x) {
  int low = 0;
  for (int high = 255; low < high;) {
    const int middle = (low + high) / 2;
    if (ranks.midpoints[middle] * scale >= x) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return uint8_t(low);
}

template <DType dtype>
float absolute_maximum_of(const void* x, int64_t first, int64_t count) {
  constexpr int64_t kPiece = 1024;
  float y[kPiece];
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t piece = smaller(kPiece, count - i);
    load_floats<dtype>(x, first + i, piece, y);
    const uint32_t magnitude = float_to_bits(absolute_maximum(y, piece));
    largest = magnitude > largest ? magnitude : largest;
  }
  return bits_to_float(largest);
}

// Elements [first, first + count) of one block.
template <DType dtype>
void rank8_block(const void* x, int64_t first, int64_t count, const Ranks8& ranks, float scale,
                 uint8_t* codes) {
  const auto* source = static_cast<const typename Element<dtype>::Type*>(x) + first;
  const float reciprocal = 1.0f / scale;
  for (int64_t i = 0; i < count; ++i) {
    const float value = Element<dtype>::load(source[i]);
    codes[first + i] = guessable(scale)
                           ? rank8(ranks, scale, value, ranks.guess[guess_bin(value * reciprocal)])
                           : rank8_bisect(ranks, scale, value);
  }
}

template <DType dtype>
void quantize_8bit_plain(const void* x, int64_t numel, int64_t block_size, const Ranks8& ranks,
                         int64_t begin, int64_t end, uint8_t* codes, float* scales) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * block_size;
    const int64_t count = smaller(block_size, numel - first);
    scales[block] = absolute_maximum_of<dtype>(x, first, count);
    rank8_block<dtype>(x, first, count, ranks, scales[block], codes);
  }
}

void quantize_8bit(const void* x, DType dtype, int64_t numel, int64_t block_size,
                   const Ranks8& ranks, int64_t begin, int64_t end, uint8_t* codes, float* scales) {
  with_dtype(dtype, [&]<DType d>() {
    quantize_8bit_plain<d>(x, numel, block_size, ranks, begin, end, codes, scales);
  });
}

template <DType dtype>
void dequantize_8bit_plain(const uint8_t* codes, const float* table, const float* scales,
                           int64_t block_size, int64_t begin, int64_t end, void* out) {
  auto* target = static_cast<typename Element<dtype>::Type*>(out);
  for (int64_t i = begin; i < end;) {
    const int64_t block = i / block_size;
    const float scale = scales[block];
    const int64_t left = (block + 1) * block_size - i;
    for (const int64_t stop = i + smaller(left, end - i); i < stop; ++i) {
      target[i] = Element<dtype>::store(table[codes[i]] * scale);
    }
  }
}

void dequantize_8bit(const uint8_t* codes, const float* table, const float* scales,
                     int64_t block_size, int64_t begin, int64_t end, DType dtype, void* out) {
  with_dtype(dtype, [&]<DType d>() {
    dequantize_8bit_plain<d>(codes, table, scales, block_size, begin, end, out);
  });
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
