// What the kernels work on: views of memory that the operators have checked.
//
// Every pointer is aligned to its element, every size is right: kernels check nothing.

#pragma once

#include <cstdint>

namespace halfbyte {

enum class DType { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t kMaxBlockSize = 4096;
constexpr uint32_t kAbsMask = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kSmallestNormal = 0x1p-126f;

// What bitsandbytes stores as the scale of a short last block of zeros.
constexpr float kEmptyTailScale = 1e-38f;

// One scale a block: float32 as it is, or 8-bit codes of a table around an offset.
struct Scales {
  const float* plain;          // or nullptr, and then:
  const uint8_t* codes;        // one a block
  const float* nested_table;   // [256]
  const float* nested_scales;  // one a `nested_block_size` codes
  float offset;
  int64_t nested_block_size;
};

// Codes and scales of `numel` elements. Element i is the high nibble of byte i / 2 when i is even.
struct Quantized {
  const uint8_t* codes;
  const float* table;  // [16]
  Scales scales;
  int64_t block_size;  // a power of two from 32 to 4096
  int64_t numel;
};

// The sorted table of a 4-bit codebook, as quantization needs it.
struct Ranks {
  float midpoints[16];  // 15, ascending; the last entry is never reached
  uint32_t codes[16];   // rank in the sorted table -> code
};

// The sorted 256-entry table of an 8-bit codebook, as quantization needs it.
struct Ranks8 {
  static constexpr int kOctaves = 22;              // magnitudes below 2^-22 share a bin
  static constexpr int kBins = kOctaves * 64 + 1;  // 64 bins an octave, and one for >= 1
  static constexpr uint32_t kFirst = (127u - kOctaves) << 6;
  double midpoints[256];  // 255, ascending, and infinity
  // Bin of x / absmax -> a code not above the right one. Negative bins come first, descending in
  // magnitude. Padded, so that four bytes may be read at any entry.
  uint8_t guess[2 * kBins + 4];
};

// What an AdamW step does to every element alike: see halfbyte/kernels/adamw.py.
struct AdamWScalars {
  float decay, weight1, beta2, weight2, correction, eps, step_size;
};

// Row-major x [rows, in_features] times the transpose of W [out_features, in_features].
struct LinearShape {
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
};

// Helpers have internal linkage: each instruction set keeps its own copy, so that the linker can
// never hand one compiled for AVX-512 to a machine without it.
static inline float bits_to_float(uint32_t u) { return __builtin_bit_cast(float, u); }
static inline uint32_t float_to_bits(float f) { return __builtin_bit_cast(uint32_t, f); }

static inline float bfloat16_to_float(uint16_t v) { return bits_to_float(uint32_t(v) << 16); }

// Nearest, ties to even; keeps subnormals and NaN.
static inline uint16_t float_to_bfloat16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & kAbsMask) > kInfinityBits ? 0x7fc0u : rounded);
}

static inline float float16_to_float(uint16_t v) {
  // The exponent is 112 too small after the shift; the product corrects it, subnormals included.
  const uint32_t magnitude = uint32_t(v & 0x7fffu) << 13;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= (31u << 23) ? kInfinityBits : 0u;
  const uint32_t sign = uint32_t(v & 0x8000u) << 16;
  return bits_to_float(float_to_bits(scaled) | special | sign);
}

// Nearest, ties to even; keeps subnormals and NaN.
static inline uint16_t float_to_float16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t magnitude = u & kAbsMask;
  // 0.5 has the unit in the last place of a float16 subnormal: the addition rounds to it.
  const float aligned = bits_to_float(magnitude) + 0.5f;
  const uint32_t subnormal = float_to_bits(aligned) - float_to_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > kInfinityBits ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t result = magnitude >= (143u << 23) ? special : finite;
  return uint16_t(result | ((u >> 16) & 0x8000u));
}

}  // namespace halfbyte
