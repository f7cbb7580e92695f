// Causal attention, forward and backward, over blocks of queries and keys that stay in cache.
// Included once in the namespace of each instruction set, which says how wide a register is.
//
// A row is a query of one head; the heads of a group stand next to each other, so that one block
// of keys serves them all. Blocks are brought into panels once and multiplied in tiles of registers
// (attention_tiles.h). Scores are kept in powers of two: log2(e) is in their factor. Source of the
// method: FlashAttention-2, arXiv:2307.08691.
//
// `Products` is how blocks are multiplied: FloatProducts below, PairProducts in attention_pairs.h.
//   Unit                   what panels are made of (attention_tiles.h)
//   kScaled                rows are loaded times a factor; otherwise their products are multiplied
//   load_rows              the rows of a piece, in units of adjacent features
//   load_columns           the same in units of adjacent rows
//   load_keys              the same in units of adjacent features, transposed
//   soften, differentiate  what lies between the products: attention_softmax.h

#pragma once

#include "attention_softmax.h"
#if defined(HALFBYTE_BFLOAT16_PAIRS)
#include "attention_pairs.h"
#endif

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Products of floats, in any dtype. A panel by rows serves as one by columns, too, and weights stay
// where their scores were.
struct FloatProducts {
  using Unit = float;
  static constexpr bool kScaled = true;

  static void load_rows(const Attention& a, const Heads& source, const Piece& piece, float factor,
                        float* rows) {
    load_float_rows(a.dtype, source, piece, a.head_dim, factor, rows, a.feature_stride());
  }
  static void load_columns(const Attention& a, const Heads& source, const Piece& piece,
                           float* rows) {
    load_rows(a, source, piece, 1.0f, rows);
  }
  static void load_keys(const Attention& a, const Heads& source, const Piece& piece, float* rows,
                        float* keys) {
    load_rows(a, source, piece, 1.0f, rows);
    transpose(rows, a.feature_stride(), piece.tokens, a.head_dim, keys);
  }
  static void soften(const Block& block, const Constants& constants, int64_t features,
                     int64_t stride, float* scores, float* maxima, float* totals, float* out) {
    soften_floats(block, constants, features, stride, scores, maxima, totals, out);
  }
  static void differentiate(const Block& block, const Constants& constants, const float* lse,
                            const float* delta, float* scores, float* grads, float*) {
    differentiate_floats(block, constants, lse, delta, scores, grads);
  }
};

// Which keys of the block from `key` on the rows of queries [begin, end) see. Empty: false.
bool see(const Attention& a, const Segment& segment, int64_t begin, int64_t end, int64_t key,
         Block& block) {
  const int64_t heads = a.heads_each();
  block.rows = (end - begin) * heads;
  block.keys = smaller(Attention::kKeys, segment.num_keys - key);
  if (segment.last_key(end - 1) <= key || segment.first_key(begin, a.window) >= key + block.keys) {
    return false;
  }
  int64_t row = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t last = smaller(larger(segment.last_key(i) - key, 0), block.keys);
    const int64_t first = smaller(larger(segment.first_key(i, a.window) - key, 0), last);
    for (int64_t h = 0; h < heads; ++h, ++row) {
      block.first[row] = int32_t(first);
      block.last[row] = int32_t(last);
    }
  }
  return true;
}

// Takes the parts of a scratch memory one after the other.
struct Parts {
  float* next;

  template <typename T = float>
  T* take(int64_t count) {
    static_assert(sizeof(T) == sizeof(float));
    float* part = next;
    next += count;
    return reinterpret_cast<T*>(part);
  }
};

// out and lse for the task's queries, over all keys they see.
template <typename Products>
void forward(const Attention& a, const AttentionTask& task, float* scratch) {
  using Unit = typename Products::Unit;
  const Constants constants(a, Products::kScaled);
  const Segment& segment = task.segment;
  const int64_t heads = a.heads_each(), head = task.group * heads;
  const int64_t features = a.head_dim, padded = pad_to_lanes(features);
  const int64_t depth = units_for<Unit>(features), stride = a.feature_stride();
  const int64_t queries = task.last_query - task.first_query, rows = queries * heads;
  Parts parts{scratch};
  Unit* query = parts.take<Unit>(rows * stride);
  float* out = parts.take(rows * stride);
  Unit* key_rows = parts.take<Unit>(Attention::kKeys * stride);
  Unit* value = parts.take<Unit>(Attention::kKeys * stride);
  Unit* key = parts.take<Unit>(features * kKeyStride);
  float* scores = parts.take(a.block_rows() * kKeyStride);
  float* maxima = parts.take(rows);
  float* totals = parts.take(rows);
  Block block{0, 0, parts.take<int32_t>(a.block_rows()), parts.take<int32_t>(a.block_rows())};

  const Piece owned{segment.query + task.first_query, queries, head, heads};
  Products::load_rows(a, a.q, owned, constants.query_factor, query);
  for (int64_t m = 0; m < rows; ++m) {
    maxima[m] = kMinusInfinity;
    totals[m] = 0.0f;
    for (int64_t i = 0; i < padded; ++i) out[m * stride + i] = 0.0f;
  }
  const int64_t begin = segment.first_key(task.first_query, a.window);
  const int64_t end = segment.last_key(task.last_query - 1);
  for (int64_t n = begin / Attention::kKeys * Attention::kKeys; n < end; n += Attention::kKeys) {
    const int64_t keys = smaller(Attention::kKeys, segment.num_keys - n);
    const Piece seen{segment.key + n, keys, task.group, 1};
    Products::load_keys(a, a.k, seen, key_rows, key);
    Products::load_columns(a, a.v, seen, value);
    for (int64_t i = task.first_query; i < task.last_query; i += a.block_queries()) {
      const int64_t stop = smaller(i + a.block_queries(), task.last_query);
      if (!see(a, segment, i, stop, n, block)) continue;
      const int64_t row = (i - task.first_query) * heads;
      multiply_visible(block, query + row * stride, stride, key, depth, scores);
      Products::soften(block, constants, padded, stride, scores, maxima + row, totals + row,
                       out + row * stride);
      add_weighted_keys(block, reinterpret_cast<const Unit*>(scores), value, padded, stride,
                        out + row * stride);
    }
  }
  store_rows(
      a.dtype, out, stride, [&](int64_t m) { return 1.0f / totals[m]; }, owned, features, a.out);
  for (int64_t m = 0; m < rows; ++m) {
    a.lse[(head + m % heads) * a.num_queries + owned.token + m / heads] =
        (maxima[m] + __builtin_log2f(totals[m])) * kLn2;
  }
}

// delta for tokens [begin, end).
void attention_delta(const Attention& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&]<DType d>() {
    using T = typename Element<d>::Type;
    const auto row_of = [](const Heads& x, int64_t t, int64_t h) {
      return static_cast<const T*>(x.data) + t * x.token_stride + h * x.head_stride;
    };
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < a.num_heads; ++h) {
        const T* grad = row_of(a.grad, t, h);
        const T* out = row_of(a.out, t, h);
        float lanes[16] = {};
        int64_t i = 0;
        for (; i + 16 <= a.head_dim; i += 16) {
          for (int l = 0; l < 16; ++l) {
            lanes[l] += Element<d>::load(grad[i + l]) * Element<d>::load(out[i + l]);
          }
        }
        for (int l = 0; i < a.head_dim; ++i, ++l) {
          lanes[l] += Element<d>::load(grad[i]) * Element<d>::load(out[i]);
        }
        a.delta[h * a.num_queries + t] = reduce<16>(lanes, [](float x, float y) { return x + y; });
      }
    }
  });
}

// Gradients of the queries, or of the keys and values, or of both, that the task owns. What it
// does not own is computed again by another task; the sums and their order are the same.
template <typename Products>
void backward(const Attention& a, const AttentionTask& task, float* scratch) {
  using Unit = typename Products::Unit;
  constexpr bool kPaired = Units<Unit>::kTerms > 1;
  const Constants constants(a, Products::kScaled);
  const Segment& segment = task.segment;
  const int64_t heads = a.heads_each(), head = task.group * heads;
  const int64_t features = a.head_dim, padded = pad_to_lanes(features);
  const int64_t depth = units_for<Unit>(features), stride = a.feature_stride();
  const int64_t panel = Attention::kKeys * stride, row_panel = a.block_rows() * stride;
  const int64_t score_panel = a.block_rows() * kKeyStride;
  Parts parts{scratch};
  Unit* query = parts.take<Unit>(row_panel);
  Unit* grad_out = parts.take<Unit>(row_panel);
  Unit* key_rows = parts.take<Unit>(panel);
  float* grad_key = parts.take(panel);
  float* grad_value = parts.take(panel);
  Unit* key = parts.take<Unit>(features * kKeyStride);
  Unit* value = parts.take<Unit>(features * kKeyStride);
  float* scores = parts.take(score_panel);
  float* grads = parts.take(score_panel);
  // Units of adjacent rows where those of adjacent features or keys are others.
  Unit* query_columns = kPaired ? parts.take<Unit>(row_panel) : query;
  Unit* grad_columns = kPaired ? parts.take<Unit>(row_panel) : grad_out;
  Unit* key_columns = kPaired ? parts.take<Unit>(panel) : key_rows;
  Unit* grad_rows = kPaired ? parts.take<Unit>(score_panel) : reinterpret_cast<Unit*>(grads);
  float* lse = parts.take(a.block_rows());
  float* delta = parts.take(a.block_rows());
  Block block{0, 0, parts.take<int32_t>(a.block_rows()), parts.take<int32_t>(a.block_rows())};
  float* grad_query = parts.next;

  const int64_t queries = task.last_query - task.first_query;
  if (task.writes_queries) {
    for (int64_t i = 0; i < queries * heads * stride; ++i) grad_query[i] = 0.0f;
  }
  for (int64_t n = task.first_key; n < task.last_key; n += Attention::kKeys) {
    const int64_t keys = smaller(Attention::kKeys, segment.num_keys - n);
    const Piece seen{segment.key + n, keys, task.group, 1};
    Products::load_keys(a, a.v, seen, key_rows, value);
    Products::load_keys(a, a.k, seen, key_rows, key);
    if (kPaired && task.writes_queries) Products::load_columns(a, a.k, seen, key_columns);
    if (task.writes_keys) {
      for (int64_t i = 0; i < 2 * panel; ++i) grad_key[i] = 0.0f;  // and grad_value
    }
    for (int64_t i = task.first_query; i < task.last_query; i += a.block_queries()) {
      const int64_t stop = smaller(i + a.block_queries(), task.last_query);
      if (!see(a, segment, i, stop, n, block)) continue;
      const Piece rows{segment.query + i, stop - i, head, heads};
      Products::load_rows(a, a.q, rows, constants.query_factor, query);
      Products::load_rows(a, a.grad, rows, 1.0f, grad_out);
      if (kPaired && task.writes_keys) {
        Products::load_columns(a, a.q, rows, query_columns);
        Products::load_columns(a, a.grad, rows, grad_columns);
      }
      for (int64_t m = 0; m < block.rows; ++m) {
        const int64_t at = (head + m % heads) * a.num_queries + rows.token + m / heads;
        lse[m] = a.lse[at] * kLog2E;
        delta[m] = a.delta[at];
      }
      multiply_visible(block, query, stride, key, depth, scores);
      multiply_visible(block, grad_out, stride, value, depth, grads);
      Products::differentiate(block, constants, lse, delta, scores, grads, grad_rows);
      if (task.writes_keys) {
        add_weighted_rows(block, reinterpret_cast<const Unit*>(scores), grad_columns, padded,
                          stride, grad_value);
        add_weighted_rows(block, reinterpret_cast<const Unit*>(grads), query_columns, padded,
                          stride, grad_key);
      }
      if (task.writes_queries) {
        add_weighted_keys(block, grad_rows, key_columns, padded, stride,
                          grad_query + (i - task.first_query) * heads * stride);
      }
    }
    if (task.writes_keys) {
      store_rows(
          a.dtype, grad_key, stride, [&](int64_t) { return constants.key_factor; }, seen, features,
          a.grad_k);
      store_rows(
          a.dtype, grad_value, stride, [](int64_t) { return 1.0f; }, seen, features, a.grad_v);
    }
  }
  if (task.writes_queries) {
    store_rows(
        a.dtype, grad_query, stride, [&](int64_t) { return a.scale; },
        {segment.query + task.first_query, queries, head, heads}, features, a.grad_q);
  }
}

void attention_forward(const Attention& a, const AttentionTask& task, float* scratch) {
#if defined(HALFBYTE_BFLOAT16_PAIRS)
  if (a.dtype == DType::kBFloat16) return forward<PairProducts>(a, task, scratch);
#endif
  forward<FloatProducts>(a, task, scratch);
}

void attention_backward(const Attention& a, const AttentionTask& task, float* scratch) {
#if defined(HALFBYTE_BFLOAT16_PAIRS)
  if (a.dtype == DType::kBFloat16) return backward<PairProducts>(a, task, scratch);
#endif
  backward<FloatProducts>(a, task, scratch);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
