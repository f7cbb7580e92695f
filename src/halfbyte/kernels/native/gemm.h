// C = A B, summed in float32 registers, for factors of any float dtype. Included once in the
// namespace of each instruction set.
//
// B is packed once into strips of kStripWidth columns, in units of floats or, where both factors
// are bfloat16 and the instruction set multiplies those, of pairs (units.h); each strip is
// contiguous along the depth. A task owns a block of C: it packs its rows of A, kGemmDepth units at
// a time, and multiplies them with one strip after the other in tiles that stay in registers. The
// order of summation of an element depends on the depth and the units alone, so neither the cut
// into tasks nor the number of threads changes a bit. Source of the scheme: Goto and van de Geijn,
// doi:10.1145/1356052.1356053.

#pragma once

#include "gemm_types.h"
#include "tiles.h"
#if defined(HALFBYTE_BFLOAT16_PAIRS)
#include "pairs.h"
#endif

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t kStripWidth = kTileWidth;

// How the numbers of a view become units:
//   across  units of adjacent numbers [begin, end) of a row
//   down    units of adjacent rows from `row` on, of `rows` that are left, at numbers [begin, end)
template <DType dtype>
struct FloatPanels {
  using Unit = float;
  static void across(const View& view, int64_t row, int64_t begin, int64_t end, float* out) {
    load_floats<dtype>(view.data, row * view.row_stride + begin, end - begin, out);
  }
  static void down(const View& view, int64_t row, int64_t, int64_t begin, int64_t end, float* out) {
    across(view, row, begin, end, out);
  }
};

#if defined(HALFBYTE_BFLOAT16_PAIRS)
struct PairPanels {
  using Unit = Pair;
  static const uint16_t* at(const View& view, int64_t row, int64_t column) {
    return static_cast<const uint16_t*>(view.data) + row * view.row_stride + column;
  }
  static void across(const View& view, int64_t row, int64_t begin, int64_t end, Pair* out) {
    pair_adjacent(at(view, row, begin), end - begin, out);
  }
  static void down(const View& view, int64_t row, int64_t rows, int64_t begin, int64_t end,
                   Pair* out) {
    const uint16_t* later = rows > 1 ? at(view, row + 1, begin) : nullptr;
    pair_rows(at(view, row, begin), later, end - begin, out);
  }
};
#endif

// Calls body.operator()<Panels>().
template <typename Body>
void with_panels(DType dtype, [[maybe_unused]] bool paired, Body body) {
#if defined(HALFBYTE_BFLOAT16_PAIRS)
  if (paired) return body.template operator()<PairPanels>();
#endif
  with_dtype(dtype, [&]<DType d>() { body.template operator()<FloatPanels<d>>(); });
}

// The rows of b, which are rows [first, first + rows) of the whole, into every strip. `first` is
// the first row of a unit.
template <typename Panels>
void pack_rows(const View& b, int64_t first, int64_t rows, int64_t depth, int64_t columns,
               typename Panels::Unit* strips) {
  using Unit = typename Panels::Unit;
  constexpr int64_t kTerms = Units<Unit>::kTerms;
  for (int64_t i = 0; i < rows; i += kTerms) {
    for (int64_t n = 0; n < columns; n += kStripWidth) {
      const int64_t width = smaller(kStripWidth, columns - n);
      Unit* target = strips + n * units_for<Unit>(depth) + (first + i) / kTerms * kStripWidth;
      Panels::down(b, i, rows - i, n, n + width, target);
      for (int64_t j = width; j < kStripWidth; ++j) target[j] = Unit{};
    }
  }
}

// The columns whose elements are the rows of `bt` into strips of their own.
template <typename Panels>
void pack_columns(const View& bt, int64_t columns, int64_t depth, typename Panels::Unit* strips) {
  using Unit = typename Panels::Unit;
  constexpr int64_t kPiece = 64, kTerms = Units<Unit>::kTerms;
  const int64_t units = units_for<Unit>(depth);
  Unit rows[kStripWidth][kPiece];
  for (int64_t n = 0; n < columns; n += kStripWidth) {
    const int64_t width = smaller(kStripWidth, columns - n);
    for (int64_t j = width; j < kStripWidth; ++j) {
      for (Unit& value : rows[j]) value = Unit{};
    }
    for (int64_t k = 0; k < units; k += kPiece) {
      const int64_t piece = smaller(kPiece, units - k);
      const int64_t end = smaller((k + piece) * kTerms, depth);
      for (int64_t j = 0; j < width; ++j) Panels::across(bt, n + j, k * kTerms, end, rows[j]);
      Unit* target = strips + n * units + k * kStripWidth;
      const int64_t squares = piece / kLanes * kLanes;
      for (int64_t i = 0; i < squares; i += kLanes) {
        for (int64_t j = 0; j < kStripWidth; j += kLanes) {
          Floats square[kLanes];
          for (int m = 0; m < kLanes; ++m) square[m] = load_units(rows[j + m] + i);
          transpose(square);
          for (int m = 0; m < kLanes; ++m) {
            store_units(target + (i + m) * kStripWidth + j, square[m]);
          }
        }
      }
      for (int64_t i = squares; i < piece; ++i) {
        for (int j = 0; j < kStripWidth; ++j) target[i * kStripWidth + j] = rows[j][i];
      }
    }
  }
}

void gemm_pack_rows(const View& b, bool paired, int64_t first, int64_t rows, int64_t depth,
                    int64_t columns, float* strips) {
  with_panels(b.dtype, paired, [&]<typename Panels>() {
    pack_rows<Panels>(b, first, rows, depth, columns,
                      reinterpret_cast<typename Panels::Unit*>(strips));
  });
}

void gemm_pack_columns(const View& bt, bool paired, int64_t columns, int64_t depth, float* strips) {
  with_panels(bt.dtype, paired, [&]<typename Panels>() {
    pack_columns<Panels>(bt, columns, depth, reinterpret_cast<typename Panels::Unit*>(strips));
  });
}

// Writes sums [rows][stride] times alpha, plus beta times what c holds, plus a bias, rounded once.
template <DType dtype>
void write_block(const Gemm& gemm, const GemmBlock& block, const float* sums, int64_t stride) {
  using Out = Element<dtype>;
  const auto* bias = static_cast<const typename Out::Type*>(gemm.bias);
  auto* target = static_cast<typename Out::Type*>(gemm.c);
  for (int64_t m = block.row; m < block.row_end; ++m, sums += stride) {
    auto* row = target + m * gemm.c_stride;
    const float* values = sums - block.column;
    int64_t n = block.column;
    for (; n + kLanes <= block.column_end; n += kLanes) {
      Floats value = broadcast(gemm.alpha) * load(values + n);
      if (gemm.beta != 0.0f) value += broadcast(gemm.beta) * load<dtype>(row + n);
      if (bias != nullptr) value += load<dtype>(bias + n);
      store<dtype>(row + n, value);
    }
    for (; n < block.column_end; ++n) {
      float value = gemm.alpha * values[n];
      if (gemm.beta != 0.0f) value += gemm.beta * Out::load(row[n]);
      if (bias != nullptr) value += Out::load(bias[n]);
      row[n] = Out::store(value);
    }
  }
}

template <typename Panels, bool kTransposed>
void sum_block(const Gemm& gemm, const GemmBlock& block, typename Panels::Unit* a, float* sums,
               int64_t stride) {
  using Unit = typename Panels::Unit;
  constexpr int64_t kTerms = Units<Unit>::kTerms;
  const int64_t rows = block.row_end - block.row, units = units_for<Unit>(gemm.depth);
  const auto* packed = reinterpret_cast<const Unit*>(gemm.packed);
  for (int64_t k = 0; k < units; k += kGemmDepth) {
    const int64_t depth = smaller(kGemmDepth, units - k);
    const int64_t a_stride = kTransposed ? kGemmRows : kGemmDepth;
    if constexpr (kTransposed) {
      for (int64_t i = 0; i < depth; ++i) {
        const int64_t first = (k + i) * kTerms;
        Panels::down(gemm.a, first, gemm.depth - first, block.row, block.row_end, a + i * a_stride);
      }
    } else {
      const int64_t end = smaller((k + depth) * kTerms, gemm.depth);
      for (int64_t m = 0; m < rows; ++m) {
        Panels::across(gemm.a, block.row + m, k * kTerms, end, a + m * a_stride);
      }
    }
    for (int64_t n = block.column; n < block.column_end; n += kStripWidth) {
      const Unit* strip = packed + n * units + k * kStripWidth;
      // The rank of an adapter may not fill a strip.
      const int64_t width = pad_to_lanes(block.column_end - n);
      for (int64_t m = 0; m < rows; m += kTileRows) {
        multiply_tile<kTransposed>(rows - m, width, a + m * (kTransposed ? 1 : a_stride), a_stride,
                                   strip, kStripWidth, depth, k != 0,
                                   sums + m * stride + (n - block.column), stride);
      }
    }
  }
}

void gemm_block(const Gemm& gemm, const GemmBlock& block, float* scratch) {
  float* sums = scratch + kGemmRows * kGemmDepth;
  const int64_t stride =
      (block.column_end - block.column + kStripWidth - 1) / kStripWidth * kStripWidth;
  if (gemm.depth == 0) {
    for (int64_t i = 0; i < (block.row_end - block.row) * stride; ++i) sums[i] = 0.0f;
  } else {
    with_panels(gemm.a.dtype, gemm.paired, [&]<typename Panels>() {
      auto* a = reinterpret_cast<typename Panels::Unit*>(scratch);
      if (gemm.a_transposed) {
        sum_block<Panels, true>(gemm, block, a, sums, stride);
      } else {
        sum_block<Panels, false>(gemm, block, a, sums, stride);
      }
    });
  }
  with_dtype(gemm.c_dtype, [&]<DType d>() { write_block<d>(gemm, block, sums, stride); });
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
