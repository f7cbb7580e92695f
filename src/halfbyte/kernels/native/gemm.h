// C = A B in float32 registers for operands of any float dtype, on processors whose own 16-bit
// products PyTorch does not reach. Included once in the namespace of each instruction set.
//
// B is packed once into strips of kStripWidth columns, widened to float32, each strip contiguous
// along the depth. A task owns a block of C: it widens its rows of A, `kDepth` columns at a time,
// and multiplies them with one strip after the other in tiles that stay in registers. The order of
// summation of an element depends on the depth alone, so neither the cut into tasks nor the number
// of threads changes a bit. Source of the scheme: Goto and van de Geijn,
// doi:10.1145/1356052.1356053.

#pragma once

#include "gemm_types.h"
#include "lanes.h"
#include "plain.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int kStripColumns = 2;  // registers across a tile
constexpr int kStripWidth = kStripColumns * kLanes;
constexpr int kStripRows = kLanes == 16 ? 12 : (kLanes == 8 ? 6 : 4);

// Elements (row, begin..end) of a view whose columns are adjacent, as floats.
template <DType dtype>
void widen(const View& view, int64_t row, int64_t begin, int64_t end, float* out) {
  load_floats<dtype>(view.data, row * view.row_stride + begin, end - begin, out);
}

// A tile of c [rows][columns of a strip] over `depth`, added to c unless it is the first.
template <int kRows, bool kTransposed>
void strip_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, bool add, float* c,
                int64_t c_stride) {
  Floats sums[kRows][kStripColumns];
  for (auto& row : sums) {
    for (auto& sum : row) sum = Floats{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats columns[kStripColumns];
    for (int n = 0; n < kStripColumns; ++n) columns[n] = load(b + k * kStripWidth + n * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const Floats x = broadcast(kTransposed ? a[k * a_stride + m] : a[m * a_stride + k]);
      for (int n = 0; n < kStripColumns; ++n) sums[m][n] = multiply_add(x, columns[n], sums[m][n]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    float* row = c + m * c_stride;
    for (int n = 0; n < kStripColumns; ++n) {
      store(row + n * kLanes, add ? load(row + n * kLanes) + sums[m][n] : sums[m][n]);
    }
  }
}

template <bool kTransposed, int kRows>
void strip_tile_of(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t depth,
                   bool add, float* c, int64_t c_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return strip_tile_of<kTransposed, kRows - 1>(rows, a, a_stride, b, depth, add, c, c_stride);
    }
  }
  strip_tile<kRows, kTransposed>(a, a_stride, b, depth, add, c, c_stride);
}

// The rows of b, which are rows [first, first + rows) of the whole, into every strip.
template <DType dtype>
void pack_rows(const View& b, int64_t first, int64_t rows, int64_t depth, int64_t columns,
               float* strips) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < columns; n += kStripWidth) {
      const int64_t width = smaller(kStripWidth, columns - n);
      float* target = strips + n * depth + (first + i) * kStripWidth;
      widen<dtype>(b, i, n, n + width, target);
      for (int64_t j = width; j < kStripWidth; ++j) target[j] = 0.0f;
    }
  }
}

// The columns whose elements are the rows of `bt` into strips of their own.
template <DType dtype>
void pack_columns(const View& bt, int64_t columns, int64_t depth, float* strips) {
  constexpr int64_t kPiece = 64;
  float rows[kStripWidth][kPiece];
  for (int64_t n = 0; n < columns; n += kStripWidth) {
    const int64_t width = smaller(kStripWidth, columns - n);
    for (int64_t j = width; j < kStripWidth; ++j) {
      for (float& value : rows[j]) value = 0.0f;
    }
    for (int64_t k = 0; k < depth; k += kPiece) {
      const int64_t piece = smaller(kPiece, depth - k);
      for (int64_t j = 0; j < width; ++j) widen<dtype>(bt, n + j, k, k + piece, rows[j]);
      float* target = strips + n * depth + k * kStripWidth;
      const int64_t squares = piece / kLanes * kLanes;
      for (int64_t i = 0; i < squares; i += kLanes) {
        for (int64_t j = 0; j < kStripWidth; j += kLanes) {
          Floats square[kLanes];
          for (int m = 0; m < kLanes; ++m) square[m] = load(rows[j + m] + i);
          transpose(square);
          for (int m = 0; m < kLanes; ++m) store(target + (i + m) * kStripWidth + j, square[m]);
        }
      }
      for (int64_t i = squares; i < piece; ++i) {
        for (int j = 0; j < kStripWidth; ++j) target[i * kStripWidth + j] = rows[j][i];
      }
    }
  }
}

void gemm_pack_rows(const View& b, int64_t first, int64_t rows, int64_t depth, int64_t columns,
                    float* strips) {
  with_dtype(b.dtype, [&]<DType d>() { pack_rows<d>(b, first, rows, depth, columns, strips); });
}

void gemm_pack_columns(const View& bt, int64_t columns, int64_t depth, float* strips) {
  with_dtype(bt.dtype, [&]<DType d>() { pack_columns<d>(bt, columns, depth, strips); });
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

template <bool kTransposed>
void sum_block(const Gemm& gemm, const GemmBlock& block, float* a, float* sums, int64_t stride) {
  const int64_t rows = block.row_end - block.row;
  for (int64_t k = 0; k < gemm.depth; k += kGemmDepth) {
    const int64_t depth = smaller(kGemmDepth, gemm.depth - k);
    const int64_t a_stride = kTransposed ? kGemmRows : kGemmDepth;
    with_dtype(gemm.a.dtype, [&]<DType d>() {
      if constexpr (kTransposed) {
        for (int64_t i = 0; i < depth; ++i) {
          widen<d>(gemm.a, k + i, block.row, block.row_end, a + i * a_stride);
        }
      } else {
        for (int64_t m = 0; m < rows; ++m) {
          widen<d>(gemm.a, block.row + m, k, k + depth, a + m * a_stride);
        }
      }
    });
    for (int64_t n = block.column; n < block.column_end; n += kStripWidth) {
      const float* strip = gemm.packed + n * gemm.depth + k * kStripWidth;
      for (int64_t m = 0; m < rows; m += kStripRows) {
        strip_tile_of<kTransposed, kStripRows>(rows - m, a + m * (kTransposed ? 1 : a_stride),
                                               a_stride, strip, depth, k != 0,
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
  } else if (gemm.a_transposed) {
    sum_block<true>(gemm, block, scratch, sums, stride);
  } else {
    sum_block<false>(gemm, block, scratch, sums, stride);
  }
  with_dtype(gemm.c_dtype, [&]<DType d>() { write_block<d>(gemm, block, sums, stride); });
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
