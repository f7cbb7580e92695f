// Products of panels that stay in cache, in tiles of registers, for the attention kernels. Included
// once in the namespace of each instruction set, which says how wide a register is.
//
// A panel is made of units of four bytes: a float, or two 16-bit numbers that stand next to each
// other along the depth of a product, where the instruction set multiplies those in pairs.

#pragma once

#include "attention_types.h"
#include "lanes.h"
#include "plain.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// The accumulators of a tile, a register for a row, and kTileColumns for columns.
constexpr int kTileRows = HALFBYTE_LANES == 16 ? 12 : (HALFBYTE_LANES == 8 ? 6 : 4);
constexpr int kTileColumns = 2;
constexpr int64_t kTileWidth = kTileColumns * kLanes;
constexpr int64_t kKeyStride = Attention::kKeyStride;

int64_t pad_to_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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

// A block of rows against a block of keys: row m sees keys [first[m], last[m]) of the block.
// Both grow with m.
struct Block {
  int64_t rows;
  int64_t keys;
  int32_t* first;
  int32_t* last;

  int64_t tile_end(int64_t m) const { return smaller(m + kTileRows, rows) - 1; }
};

// scores[m][n] = sum over units of features of a[m] b[.][n], in all tiles that contain a visible
// key.
template <typename Unit>
void multiply_visible(const Block& block, const Unit* a, int64_t a_stride, const Unit* b,
                      int64_t depth, float* scores) {
  const int64_t keys = pad_to_lanes(block.keys);
  for (int64_t n = 0; n < keys; n += kTileWidth) {
    for (int64_t m = 0; m < block.rows; m += kTileRows) {
      if (block.last[block.tile_end(m)] <= n || block.first[m] >= n + kTileWidth) continue;
      multiply_tile<false>(block.rows - m, keys - n, a + m * a_stride, a_stride, b + n, kKeyStride,
                           depth, false, scores + m * kKeyStride + n, kKeyStride);
    }
  }
}

// c[m] += sum over visible keys of weights[m][key] b[key]; a unit holds adjacent keys.
template <typename Unit>
void add_weighted_keys(const Block& block, const Unit* weights, const Unit* b, int64_t features,
                       int64_t stride, float* c) {
  constexpr int64_t kTerms = Units<Unit>::kTerms;
  for (int64_t n = 0; n < features; n += kTileWidth) {
    for (int64_t m = 0; m < block.rows; m += kTileRows) {
      const int64_t from = block.first[m] / kTerms;
      const int64_t to = units_for<Unit>(block.last[block.tile_end(m)]);
      if (from >= to) continue;
      multiply_tile<false>(block.rows - m, features - n, weights + m * kKeyStride + from,
                           kKeyStride, b + from * stride + n, stride, to - from, true,
                           c + m * stride + n, stride);
    }
  }
}

// c[key] += sum over rows that see the key of weights[row][key] b[row]; a unit holds adjacent rows.
template <typename Unit>
void add_weighted_rows(const Block& block, const Unit* weights, const Unit* b, int64_t features,
                       int64_t stride, float* c) {
  constexpr int64_t kTerms = Units<Unit>::kTerms;
  for (int64_t n = 0; n < features; n += kTileWidth) {
    int64_t from = 0, to = 0;
    for (int64_t m = 0; m < block.keys; m += kTileRows) {
      const int64_t end = smaller(m + kTileRows, block.keys);
      while (from < block.rows && block.last[from] <= m) ++from;
      while (to < block.rows && block.first[to] < end) ++to;
      if (from >= to) continue;
      const int64_t first = from / kTerms, last = units_for<Unit>(to);
      multiply_tile<true>(end - m, features - n, weights + first * kKeyStride + m, kKeyStride,
                          b + first * stride + n, stride, last - first, true, c + m * stride + n,
                          stride);
    }
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
