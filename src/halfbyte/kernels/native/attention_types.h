// What the attention kernels work on, and how their work is cut.
//
// The cut depends on the shapes alone. Every sum has its order from it, so that neither the
// number of threads nor the documents packed beside one change a bit.

#pragma once

#include "types.h"

namespace halfbyte {

// [tokens, heads, head_dim] in the memory of a projection: the features of a head are consecutive.
struct Heads {
  void* data;
  int64_t token_stride;  // in elements
  int64_t head_stride;
};

struct Attention {
  static constexpr int64_t kKeys = 64;   // keys of a block
  static constexpr int64_t kRows = 96;   // rows of a block, about: queries times heads of a group
  static constexpr int64_t kBlocks = 4;  // blocks of rows of a task that reads each key once

  DType dtype;
  int64_t num_heads;
  int64_t num_groups;  // key-value heads
  int64_t head_dim;
  int64_t num_queries;  // of all segments: the length of a row of lse and delta
  float scale;
  float softcap;   // 0 for none
  int64_t window;  // keys that a query sees at most

  Heads q, k, v, out;
  float* lse;  // natural logarithm of the sum of exponentials, [num_heads, num_queries]
  // For the backward only.
  Heads grad, grad_q, grad_k, grad_v;
  float* delta;  // sum over features of grad * out, [num_heads, num_queries]

  int64_t heads_each() const { return num_heads / num_groups; }
  int64_t block_queries() const { return heads_each() < kRows ? kRows / heads_each() : 1; }
  int64_t task_queries() const { return kBlocks * block_queries(); }
  int64_t block_rows() const { return block_queries() * heads_each(); }

  // Floats between rows of a panel: an odd number of cache lines, so that a column of the panel
  // does not fall into few sets of the cache.
  static constexpr int64_t odd_lines(int64_t floats) { return (floats + 15) / 16 / 2 * 32 + 16; }
  static constexpr int64_t kKeyStride = kKeys + 16;
  int64_t feature_stride() const { return odd_lines(head_dim); }

  // Floats of a thread's scratch memory; `queries` are those that one task owns. Where bfloat16 is
  // multiplied in pairs, the backward has panels of adjacent rows besides those of adjacent
  // features: two of rows, one of keys, one of scores.
  int64_t forward_scratch() const {
    return task_queries() * heads_each() * (2 * feature_stride() + 2) +
           kKeys * 2 * feature_stride() + head_dim * kKeyStride + block_rows() * (kKeyStride + 2);
  }
  int64_t backward_scratch(int64_t queries) const {
    return queries * heads_each() * feature_stride() + block_rows() * 4 * feature_stride() +
           kKeys * 4 * feature_stride() + 2 * head_dim * kKeyStride +
           block_rows() * (3 * kKeyStride + 4);
  }
};

// One document: its queries are the last of its keys.
struct Segment {
  int64_t query;  // first, in the packed row
  int64_t num_queries;
  int64_t key;
  int64_t num_keys;

  // Keys [first, last) of the segment that a query of the segment sees.
  int64_t last_key(int64_t i) const { return num_keys - num_queries + i + 1; }
  int64_t first_key(int64_t i, int64_t window) const {
    return window < last_key(i) ? last_key(i) - window : 0;
  }
};

// Queries and keys [begin, end) of a segment and a key-value head, whose gradients a task owns.
struct AttentionTask {
  Segment segment;
  int64_t group;
  int64_t first_query, last_query;
  int64_t first_key, last_key;
  bool writes_queries, writes_keys;
};

}  // namespace halfbyte
