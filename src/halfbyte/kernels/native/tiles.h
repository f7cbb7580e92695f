// Products of panels of units that stay in cache, in tiles of registers. Included once in the
// namespace of each instruction set, which says how wide a register is.

#pragma once

#include "units.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// The accumulators of a tile, a register for a row, and kTileColumns for columns.
constexpr int kTileRows = HALFBYTE_LANES == 16 ? 12 : (HALFBYTE_LANES == 8 ? 6 : 4);
constexpr int kTileColumns = 2;
constexpr int64_t kTileWidth = kTileColumns * kLanes;

int64_t pad_to_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// c[m][n] = sum over k of a[m][k] b[k][n], added to c if `add`; depth >= 1. With kTransposed, a is
// stored [k][m]. Unrolled by hand, or GCC keeps the sums in memory around the loop.
template <typename Unit, int kRows, int kColumns, bool kTransposed>
void tile_product(const Unit* a, int64_t a_stride, const Unit* b, int64_t b_stride, int64_t depth,
                  bool add, float* c, int64_t c_stride) {
  Floats sums[kRows][kColumns] = {};
  int64_t k = 0;
  do {
    Floats columns[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) columns[n] = load_units(b + k * b_stride + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Floats row =
          Units<Unit>::spread(kTransposed ? a[k * a_stride + m] : a[m * a_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) {
        sums[m][n] = Units<Unit>::multiply_add(row, columns[n], sums[m][n]);
      }
    }
  } while (++k < depth);
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      float* target = c + m * c_stride + n * kLanes;
      store(target, add ? load(target) + sums[m][n] : sums[m][n]);
    }
  }
}

template <bool kTransposed, int kRows, int kColumns, typename Unit>
void tile_product_of(int64_t rows, int64_t registers, const Unit* a, int64_t a_stride,
                     const Unit* b, int64_t b_stride, int64_t depth, bool add, float* c,
                     int64_t c_stride) {
  if constexpr (kColumns > 1) {
    if (registers < kColumns) {
      return tile_product_of<kTransposed, kRows, kColumns - 1>(rows, registers, a, a_stride, b,
                                                               b_stride, depth, add, c, c_stride);
    }
  }
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return tile_product_of<kTransposed, kRows - 1, kColumns>(rows, registers, a, a_stride, b,
                                                               b_stride, depth, add, c, c_stride);
    }
  }
  tile_product<Unit, kRows, kColumns, kTransposed>(a, a_stride, b, b_stride, depth, add, c,
                                                   c_stride);
}

// The tile with `rows` rows and `width` floats, or as many as a tile has.
template <bool kTransposed, typename Unit>
void multiply_tile(int64_t rows, int64_t width, const Unit* a, int64_t a_stride, const Unit* b,
                   int64_t b_stride, int64_t depth, bool add, float* c, int64_t c_stride) {
  tile_product_of<kTransposed, kTileRows, kTileColumns>(rows, width / kLanes, a, a_stride, b,
                                                        b_stride, depth, add, c, c_stride);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
