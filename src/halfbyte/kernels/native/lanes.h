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

// A register of any dtype, as floats; and the other way, rounded as in types.h.
template <DType dtype>
inline Floats load(const typename Element<dtype>::Type* p) {
  if constexpr (dtype == DType::kFloat32) {
    return load(p);
  } else {
    Halves v;
    __builtin_memcpy(&v, p, sizeof v);
    const Ints bits = __builtin_convertvector(v, Ints);
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
  if constexpr (dtype == DType::kFloat32) {
    store(p, v);
  } else if constexpr (dtype == DType::kBFloat16) {
    const Ints bits = (Ints)v;
    // An addition that would turn a NaN into something else is undone: those are quiet here.
    const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Ints result = v == v ? rounded : Ints{} + 0x7fc00000;
    const Halves halves = __builtin_convertvector(result >> 16, Halves);
    __builtin_memcpy(p, &halves, sizeof halves);
  } else {
    float lanes[kLanes];
    store(lanes, v);
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_float16(lanes[i]);
  }
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

inline float sum_of(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  return reduce<kLanes>(lanes, [](float a, float b) { return a + b; });
}

inline float largest_of(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  return reduce<kLanes>(lanes, [](float a, float b) { return a > b ? a : b; });
}

// 2^x within 2^-23 of it, relatively; exactly 1 at 0, 0 below -126.5, at most 2^127.5; keeps NaN.
//
// x is the nearest integer plus a rest in [-1/2, 1/2], where a polynomial of degree 6 (minimax
// under p(0) = 1) is within 2e-9 of 2^rest; the remainder of the bound is its rounding.
inline Floats exp2(Floats x) {
  const Floats lowest = broadcast(-127.0f), highest = broadcast(127.0f);
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
  // The integer stands in the low bits of `shifted`; -127 makes a scale of zero.
  const Ints power = (Ints)shifted - (Ints)magic;
  return p * (Floats)((power + 127) << 23);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
