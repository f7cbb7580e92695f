// Products on the CPU by our own kernels, for operators that have checked their arguments.

#pragma once

#include "checks.h"
#include "dispatch.h"
#include "workspace.h"

namespace halfbyte {

// A matrix [rows, columns]; with `transposed` the rows of the view are its columns.
struct Operand {
  View view;
  bool transposed;
  int64_t rows, columns;
};

// What the product becomes: data = alpha * product + beta * data (+ bias of each column).
struct Target {
  void* data;
  DType dtype;
  int64_t row_stride;
  float alpha, beta;
  const void* bias;  // of the same dtype, or nullptr
};

// Whether these products are faster than PyTorch's on this machine.
bool gemm_preferred(DType dtype);

// c = a b. Each of a dtype of its own; summed in float32, rounded once.
void multiply_dense(const Operand& a, const Operand& b, const Target& c);

// c = a W^T for W [out_features, a.columns], decoded to the dtype of a.
void multiply_by_transposed_weight(const Operand& a, const Quantized& weight, int64_t out_features,
                                   const Target& c);

// c = a W for W [a.columns, in_features], decoded to the dtype of a.
void multiply_by_weight(const Operand& a, const Quantized& weight, int64_t in_features,
                        const Target& c);

}  // namespace halfbyte
