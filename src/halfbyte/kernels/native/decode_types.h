// What the kernels of a decoding step work on, besides 4-bit weights.

#pragma once

#include "types.h"

namespace halfbyte {

// y [rows, out_features] = x W^T + bias, for few rows and a weight that memory has to be read for.
struct DenseRows {
  const float* x;  // [rows, in_features], dense
  int64_t rows;
  int64_t in_features;
  const void* weight;
  int64_t weight_stride;  // elements between its rows
  const void* bias;       // or nullptr
  void* y;                // dense
  int64_t out_features;
  DType dtype;  // of weight, bias and y
};

// One query token over the keys of its sequence. Features of a head are consecutive everywhere.
struct SingleQuery {
  DType dtype;
  int64_t num_heads;
  int64_t num_groups;  // key-value heads
  int64_t head_dim;
  int64_t num_keys;
  float scale;
  float softcap;  // 0 for none
  const void* q;  // [num_heads, head_dim], dense
  const void* k;  // [num_groups, num_keys, head_dim]
  const void* v;
  int64_t k_group_stride, k_stride;  // in elements
  int64_t v_group_stride, v_stride;
  void* out;  // as q

  int64_t heads_each() const { return num_heads / num_groups; }
  int64_t padded_keys() const { return (num_keys + 15) / 16 * 16; }
  // Floats of scratch memory for one group.
  int64_t scratch() const { return heads_each() * (2 * head_dim + padded_keys() + 1) + head_dim; }
};

}  // namespace halfbyte
