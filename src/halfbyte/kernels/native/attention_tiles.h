// Blocks of queries against blocks of keys: which tiles of their products attention needs.

#pragma once

#include "attention_types.h"
#include "tiles.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t kKeyStride = Attention::kKeyStride;

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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
