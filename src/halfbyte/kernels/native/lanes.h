// One register of floats, and what the kernels that are written once for every width do with it.
//
// A source defines HALFBYTE_LANES, the floats of a register, before it includes this. The
// arithmetic is GCC's and Clang's vector extension; only the fused multiply-add needs the
// instruction set.

#pragma once

#include "plain.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int kLanes = HALFBYTE_LANES;
typedef float Floats __attribute__((vector_size(4 * HALFBYTE_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * HALFBYTE_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * HALFBYTE_LANES)));

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

// 16-bit numbers in the low halves of integers, and those halves again.
inline Ints widen(const uint16_t* p) {
#if HALFBYTE_LANES == 16
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif HALFBYTE_LANES == 8
  return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Halves v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Ints);
#endif
}

inline void narrow(uint16_t* p, Ints v) {
#if HALFBYTE_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)v));
#elif HALFBYTE_LANES == 8
  const __m128i low = _mm256_castsi256_si128((__m256i)v);
  const __m128i high = _mm256_extracti128_si256((__m256i)v, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
#else
  const Halves halves = __builtin_convertvector(v, Halves);
  __builtin_memcpy(p, &halves, sizeof halves);
#endif
}

// A register of any dtype, as floats; and the other way, rounded as in types.h.
template <DType dtype>
inline Floats load(const typename Element<dtype>::Type* p) {
  if constexpr (dtype == DType::kFloat32) {
    return load(p);
  } else {
    const Ints bits = widen(p);
    if constexpr (dtype == DType::kBFloat16) return (Floats)(bits << 16);
    // As float16_to_float.
    const Ints magnitude = (bits & 0x7fff) << 13;
    const Floats scaled = (Floats)magnitude * broadcast(0x1p112f);
    const Ints special = (magnitude >= (31 << 23)) & int32_t(kInfinityBits);
    return (Floats)((Ints)scaled | special | ((bits & 0x8000) << 16));
  }
}

template <DType dtype>
inline void store(typename Element<dtype>::Type* p, Floats v) {
  const Ints bits = (Ints)v;
  if constexpr (dtype == DType::kFloat32) {
    store(p, v);
  } else if constexpr (dtype == DType::kBFloat16) {
    const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
    narrow(p, (v == v ? rounded >> 16 : Ints{} + 0x7fc0) & 0xffff);
  } else {
    // As float_to_float16.
    const Ints magnitude = bits & int32_t(kAbsMask);
    const Ints subnormal = (Ints)((Floats)magnitude + broadcast(0.5f)) - 0x3f000000;
    const Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Ints special = magnitude > int32_t(kInfinityBits) ? Ints{} + 0x7e00 : Ints{} + 0x7c00;
    const Ints finite = magnitude < (113 << 23) ? subnormal : normal;
    const Ints result = magnitude >= (143 << 23) ? special : finite;
    narrow(p, result | ((bits >> 16) & 0x8000));
  }
}

template <int... kFrom>
inline Floats shuffle(Floats a, Floats b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, Ints{kFrom...});
#endif
}

// Exchanges the two quarters off the diagonal of each square of 2 * kHalf lanes and registers.
template <int kHalf, int... kLane>
inline void exchange_quarters(Floats* rows, std::integer_sequence<int, kLane...>) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const Floats a = rows[i], b = rows[i + kHalf];
    rows[i] = shuffle<(kLane & kHalf ? kLane - kHalf + kLanes : kLane)...>(a, b);
    rows[i + kHalf] = shuffle<(kLane & kHalf ? kLane + kLanes : kLane + kHalf)...>(a, b);
  }
}

// A square of kLanes registers becomes its transpose.
template <int kHalf = kLanes / 2>
inline void transpose(Floats* rows) {
  exchange_quarters<kHalf>(rows, std::make_integer_sequence<int, kLanes>());
  if constexpr (kHalf > 1) transpose<kHalf / 2>(rows);
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// a * b + c: one rounding where the instruction set has it, two where it does not.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if HALFBYTE_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif HALFBYTE_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Over the lanes of a register, in halves: a fixed order.
template <int kCount, typename Combine>
inline float reduce(const float* lanes, Combine combine) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    float halves[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) halves[i] = combine(lanes[i], lanes[i + kCount / 2]);
    return reduce<kCount / 2>(halves, combine);
  }
}

// The same order in a register: lane i with the one kHalf after it, then with half of that.
template <int kHalf, Floats (*combine)(Floats, Floats), int... kLane>
inline float fold(Floats v, std::integer_sequence<int, kLane...> lanes) {
  v = combine(v, shuffle<((kLane + kHalf) % kLanes)...>(v, v));
  if constexpr (kHalf > 1) {
    return fold<kHalf / 2, combine>(v, lanes);
  } else {
    return v[0];
  }
}

inline Floats sum(Floats a, Floats b) { return a + b; }

inline float sum_of(Floats v) {
  return fold<kLanes / 2, sum>(v, std::make_integer_sequence<int, kLanes>());
}

inline float largest_of(Floats v) {
  return fold<kLanes / 2, larger>(v, std::make_integer_sequence<int, kLanes>());
}

// 2^x within 2^-23 of it, relatively; exactly 1 at 0, 0 below -126.5, infinite above 127.5;
// keeps NaN.
//
// x is the nearest integer plus a rest in [-1/2, 1/2], where a polynomial of degree 6 (minimax
// under p(0) = 1) is within 2e-9 of 2^rest; the remainder of the bound is its rounding.
inline Floats exp2(Floats x) {
  const Floats lowest = broadcast(-127.0f), highest = broadcast(128.0f);
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Floats magic = broadcast(0x1.8p23f);  // its unit in the last place is 1
  const Floats shifted = x + magic;
  const Floats rest = x - (shifted - magic);
  Floats p = broadcast(0x1.41fbb8p-13f);
  p = multiply_add(p, rest, broadcast(0x1.5f3e54p-10f));
  p = multiply_add(p, rest, broadcast(0x1.3b2d4cp-7f));
  p = multiply_add(p, rest, broadcast(0x1.c6aee8p-5f));
  p = multiply_add(p, rest, broadcast(0x1.ebfbdcp-3f));
  p = multiply_add(p, rest, broadcast(0x1.62e430p-1f));
  p = multiply_add(p, rest, broadcast(1.0f));
  // The integer stands in the low bits of `shifted`; -127 makes a scale of zero, 128 infinity.
  const Ints power = (Ints)shifted - (Ints)magic;
  return p * (Floats)((power + 127) << 23);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
