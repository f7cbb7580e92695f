// What factors of a product are made of while they stay in cache: units of four bytes, a float, or
// two 16-bit numbers that are adjacent along the depth, where the instruction set multiplies pairs.

#pragma once

#include "lanes.h"
#include "plain.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// What a unit is:
//   kTerms                    numbers of a unit
//   spread(Unit)              a unit in every lane
//   multiply_add(a, b, sums)  sums of floats, a lane for each lane of units
template <typename Unit>
struct Units;

template <>
struct Units<float> {
  static constexpr int64_t kTerms = 1;
  static Floats spread(float x) { return broadcast(x); }
  static Floats multiply_add(Floats a, Floats b, Floats sums) {
    return halfbyte::HALFBYTE_ISA::multiply_add(a, b, sums);
  }
};

// Units that hold `count` numbers.
template <typename Unit>
int64_t units_for(int64_t count) {
  return (count + Units<Unit>::kTerms - 1) / Units<Unit>::kTerms;
}

template <typename Unit>
Floats load_units(const Unit* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename Unit>
void store_units(Unit* p, Floats v) {
  __builtin_memcpy(p, &v, sizeof v);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
