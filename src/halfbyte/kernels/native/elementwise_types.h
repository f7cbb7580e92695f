// What the element-wise kernels work on. All rows are those of one dtype.

#pragma once

#include "types.h"

namespace halfbyte {

// [rows, features], or with a stride between rows where one is named.
struct NormRows {
  DType dtype;
  int64_t features;
  float eps;
  const float* weight;
  const void* x;
  const void* update;  // added to x first, or nullptr
  void* sum;           // x + update, or nullptr
  void* out;
  // For the backward only.
  const void* grad;
  const void* carry;  // a gradient of x from elsewhere, added, or nullptr
  void* grad_x;
};

// Pairs (i, i + half) of the features of every head of x [tokens, num_heads, 2 half].
struct Rotation {
  DType dtype;
  void* x;
  int64_t token_stride, head_stride;
  int64_t num_heads, half;
  const float* cosine;  // [tokens, half]
  const float* sine;
  bool inverse;
};

struct GatedRows {
  DType dtype;
  bool gelu;  // else silu
  int64_t features;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* out;
  // For the backward only.
  const void* grad;
  void* grad_gate;
  void* grad_up;
};

}  // namespace halfbyte
