// Pairs of bfloat16 numbers. One instruction multiplies two pairs and adds both products to a float
// (vdpbf16ps): twice what it would do with floats. Included by the AVX-512 source alone.

#pragma once

#include "units.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Two bfloat16 numbers, the earlier one in the lower half.
using Pair = uint32_t;

template <>
struct Units<Pair> {
  static constexpr int64_t kTerms = 2;
  static Floats spread(Pair x) { return (Floats)_mm512_set1_epi32(int(x)); }
  static Floats multiply_add(Floats a, Floats b, Floats sums) {
    // The second factor is the one that can be spread as it is read.
    return _mm512_dpbf16_ps(sums, (__m512bh)b, (__m512bh)a);
  }
};

// out[i] = (earlier[i], later[i]); without a later row, its half is zero.
void pair_rows(const uint16_t* earlier, const uint16_t* later, int64_t count, Pair* out) {
  const Ints kept = Ints{} + (later == nullptr ? 0 : -1);
  if (later == nullptr) later = earlier;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Ints units = widen(earlier + i) | ((widen(later + i) & kept) << 16);
    __builtin_memcpy(out + i, &units, sizeof units);
  }
  for (; i < count; ++i) out[i] = earlier[i] | (Pair(later[i]) << 16 & Pair(kept[0]));
}

// out = the `count` numbers of a row in pairs; the half that none fills is zero.
void pair_adjacent(const uint16_t* row, int64_t count, Pair* out) {
  if (count % 2 != 0) out[count / 2] = 0;
  __builtin_memcpy(out, row, size_t(count) * sizeof(uint16_t));
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
