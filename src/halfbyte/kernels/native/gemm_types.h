// What a product of matrices is made of: see gemm.h for how it is computed.

#pragma once

#include "types.h"

namespace halfbyte {

// Rows of adjacent elements, `row_stride` elements apart.
struct View {
  const void* data;
  DType dtype;
  int64_t row_stride;
};

// The block of C that a task owns at most, and how many units of the depth it packs at a time: the
// packed rows and the sums stay in a core's second-level cache, a strip of B in its first.
constexpr int64_t kGemmRows = 96;
constexpr int64_t kGemmColumns = 384;
constexpr int64_t kGemmDepth = 384;
constexpr int64_t kGemmScratch = kGemmRows * (kGemmDepth + kGemmColumns);  // floats a thread

// Every strip width divides it.
constexpr int64_t kGemmColumnUnit = 32;

// c [rows, columns] = alpha * a b + beta * c (+ bias), rows of c `c_stride` elements apart.
struct Gemm {
  View a;  // [rows, depth]; with a_transposed its rows are those of a^T
  bool a_transposed;
  const float* packed;  // b [depth, columns] in strips, the last one filled up with zeros
  bool paired;          // a and b are bfloat16, and their units are pairs
  int64_t depth;
  float alpha, beta;
  const void* bias;  // [columns] of c's dtype, or nullptr
  void* c;
  DType c_dtype;
  int64_t c_stride;
};

// Columns begin at a multiple of kGemmColumnUnit.
struct GemmBlock {
  int64_t row, row_end, column, column_end;
};

}  // namespace halfbyte
