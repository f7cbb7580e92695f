// Causal attention, forward and backward, over blocks of queries and keys that stay in cache.
// Included once in the namespace of each instruction set, which says how wide a register is.
//
// A row is a query of one head; the heads of a group stand next to each other, so that one block
// of keys serves them all. Blocks are widened to float32 once and multiplied in tiles of
// kTileRows rows by kTileColumns registers. Scores are kept in powers of two: the factor log2(e)
// is in the queries. Source of the method: FlashAttention-2, arXiv:2307.08691.

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

constexpr float kLog2E = 0x1.715476p0f;
constexpr float kLn2 = 0x1.62e430p-1f;
const float kMinusInfinity = -__builtin_inff();

int64_t pad_to_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// c[m][n] = sum over k of a[m][k] b[k][n], added to c if `add`; depth >= 1. With kTransposed, a is
// stored [k][m]. Unrolled by hand, or GCC keeps the sums in memory around the loop.
template <int kRows, int kColumns, bool kTransposed>
void tile_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                  bool add, float* c, int64_t c_stride) {
  Floats sums[kRows][kColumns] = {};
  int64_t k = 0;
  do {
    Floats columns[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) columns[n] = load(b + k * b_stride + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Floats row = broadcast(kTransposed ? a[k * a_stride + m] : a[m * a_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) sums[m][n] = multiply_add(row, columns[n], sums[m][n]);
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

template <bool kTransposed, int kRows, int kColumns>
void tile_product_of(int64_t rows, int64_t registers, const float* a, int64_t a_stride,
                     const float* b, int64_t b_stride, int64_t depth, bool add, float* c,
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
  tile_product<kRows, kColumns, kTransposed>(a, a_stride, b, b_stride, depth, add, c, c_stride);
}

// The tile with `rows` rows and `width` floats, or as many as a tile has.
template <bool kTransposed>
void multiply_tile(int64_t rows, int64_t width, const float* a, int64_t a_stride, const float* b,
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

// scores[m][n] = sum over features of a[m] b[.][n], in all tiles that contain a visible key.
void multiply_visible(const Block& block, const float* a, int64_t a_stride, const float* b,
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

// c[m] += sum over visible keys of weights[m][key] b[key].
void add_weighted_keys(const Block& block, const float* weights, const float* b, int64_t features,
                       int64_t stride, float* c) {
  for (int64_t n = 0; n < features; n += kTileWidth) {
    for (int64_t m = 0; m < block.rows; m += kTileRows) {
      const int64_t from = block.first[m];
      const int64_t to = block.last[block.tile_end(m)];
      if (from >= to) continue;
      multiply_tile<false>(block.rows - m, features - n, weights + m * kKeyStride + from,
                           kKeyStride, b + from * stride + n, stride, to - from, true,
                           c + m * stride + n, stride);
    }
  }
}

// c[key] += sum over rows that see the key of weights[row][key] b[row].
void add_weighted_rows(const Block& block, const float* weights, const float* b, int64_t features,
                       int64_t stride, float* c) {
  for (int64_t n = 0; n < features; n += kTileWidth) {
    int64_t from = 0, to = 0;
    for (int64_t m = 0; m < block.keys; m += kTileRows) {
      const int64_t end = smaller(m + kTileRows, block.keys);
      while (from < block.rows && block.last[from] <= m) ++from;
      while (to < block.rows && block.first[to] < end) ++to;
      if (from >= to) continue;
      multiply_tile<true>(end - m, features - n, weights + from * kKeyStride + m, kKeyStride,
                          b + from * stride + n, stride, to - from, true, c + m * stride + n,
                          stride);
    }
  }
}

// Heads [head, head + heads) of tokens [token, token + tokens), a row each.
struct Piece {
  int64_t token, tokens, head, heads;
};

// The rows of a piece as floats, times a factor; zeros up to a whole number of registers.
template <DType d>
void load_rows_of(const Heads& source, const Piece& piece, int64_t features, float factor,
                  float* out, int64_t stride) {
  // Rows of other heads lie between ours, which is more than the processor foresees.
  constexpr int64_t kTokensAhead = 4;
  constexpr int64_t kLine = 64 / int64_t(sizeof(typename Element<d>::Type));
  const int64_t padded = pad_to_lanes(features);
  const auto* data = static_cast<const typename Element<d>::Type*>(source.data) +
                     piece.token * source.token_stride + piece.head * source.head_stride;
  for (int64_t t = 0; t < piece.tokens; ++t) {
    const int64_t later = smaller(t + kTokensAhead, piece.tokens - 1);
    for (int64_t h = 0; h < piece.heads; ++h, out += stride) {
      const auto* row = data + t * source.token_stride + h * source.head_stride;
      const auto* next = data + later * source.token_stride + h * source.head_stride;
      for (int64_t i = 0; i < features; i += kLine) __builtin_prefetch(next + i);
      int64_t i = 0;
      for (; i + kLanes <= features; i += kLanes) {
        store(out + i, load<d>(row + i) * broadcast(factor));
      }
      for (; i < features; ++i) out[i] = Element<d>::load(row[i]) * factor;
      for (; i < padded; ++i) out[i] = 0.0f;
    }
  }
}

void load_rows(DType dtype, const Heads& source, const Piece& piece, int64_t features, float factor,
               float* out, int64_t stride) {
  with_dtype(dtype,
             [&]<DType d>() { load_rows_of<d>(source, piece, features, factor, out, stride); });
}

// The other way; each row has a factor of its own.
template <DType d, typename Factor>
void store_rows_of(const float* rows, int64_t stride, Factor factor, const Piece& piece,
                   int64_t features, const Heads& target) {
  auto* data = static_cast<typename Element<d>::Type*>(target.data) +
               piece.token * target.token_stride + piece.head * target.head_stride;
  for (int64_t t = 0; t < piece.tokens; ++t) {
    for (int64_t h = 0; h < piece.heads; ++h, rows += stride) {
      auto* out = data + t * target.token_stride + h * target.head_stride;
      const float scale = factor(t * piece.heads + h);
      int64_t i = 0;
      for (; i + kLanes <= features; i += kLanes) {
        store<d>(out + i, load(rows + i) * broadcast(scale));
      }
      for (; i < features; ++i) out[i] = Element<d>::store(rows[i] * scale);
    }
  }
}

template <typename Factor>
void store_rows(DType dtype, const float* rows, int64_t stride, Factor factor, const Piece& piece,
                int64_t features, const Heads& target) {
  with_dtype(dtype,
             [&]<DType d>() { store_rows_of<d>(rows, stride, factor, piece, features, target); });
}

// out[feature][key] from rows[key][feature]; zeros up to a whole number of registers of keys.
void transpose(const float* rows, int64_t stride, int64_t keys, int64_t features, float* out) {
  const int64_t padded = pad_to_lanes(keys);
  for (int64_t i = 0; i < features; ++i) {
    float* target = out + i * kKeyStride;
    for (int64_t n = 0; n < keys; ++n) target[n] = rows[n * stride + i];
    for (int64_t n = keys; n < padded; ++n) target[n] = 0.0f;
  }
}

// What is the same for a whole call.
struct Constants {
  float query_factor;  // in the queries: products with keys are then scores, or half the argument
                       // of tanh, in powers of two
  float key_factor;    // turns sums of score gradients times those queries into key gradients
  bool capped;
  float cap;  // softcap * log2(e)

  explicit Constants(const Attention& a)
      : query_factor(a.softcap > 0 ? a.scale / a.softcap * 2 * kLog2E : a.scale * kLog2E),
        key_factor(a.softcap > 0 ? a.softcap * (kLn2 / 2) : kLn2),
        capped(a.softcap > 0),
        cap(a.softcap * kLog2E) {}

  // tanh(s / softcap) from the product in powers of two.
  static Floats tanh(Floats product) {
    return broadcast(1.0f) - broadcast(2.0f) / (exp2(product) + broadcast(1.0f));
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

// The registers of a row that hold visible keys: [begin, end), with -infinity around those.
struct Span {
  int64_t begin, end;
};

Span visible_span(const Block& block, int64_t row, float* scores) {
  const int64_t first = block.first[row], last = block.last[row];
  if (first >= last) return {0, 0};
  const Span span{first / kLanes * kLanes, pad_to_lanes(last)};
  for (int64_t n = span.begin; n < first; ++n) scores[n] = kMinusInfinity;
  for (int64_t n = last; n < span.end; ++n) scores[n] = kMinusInfinity;
  return span;
}

void clear_around(const Span& span, int64_t keys, float* weights) {
  for (int64_t n = 0; n < span.begin; ++n) weights[n] = 0.0f;
  for (int64_t n = span.end; n < keys; ++n) weights[n] = 0.0f;
}

// Turns a block of scores into weights relative to the largest score so far, row by row, and
// brings sums and outputs to the same scale.
void soften(const Block& block, const Constants& constants, int64_t features, int64_t stride,
            float* scores, float* maxima, float* totals, float* out) {
  const int64_t keys = pad_to_lanes(block.keys);
  for (int64_t m = 0; m < block.rows; ++m) {
    float* row = scores + m * kKeyStride;
    const Span span = visible_span(block, m, row);
    if (span.begin < span.end) {
      Floats most = broadcast(kMinusInfinity);
      for (int64_t n = span.begin; n < span.end; n += kLanes) {
        Floats score = load(row + n);
        if (constants.capped) {
          // A masked -infinity becomes -cap here: mask again below.
          score = broadcast(constants.cap) * Constants::tanh(score);
          store(row + n, score);
        }
        most = larger(score, most);
      }
      if (constants.capped) visible_span(block, m, row);
      const float before = maxima[m];
      const float here = largest_of(most);
      const float now = here > before ? here : before;
      const Floats top = broadcast(now);
      Floats sum{};
      for (int64_t n = span.begin; n < span.end; n += kLanes) {
        const Floats weight = exp2(load(row + n) - top);
        store(row + n, weight);
        sum += weight;
      }
      if (now != before) {
        const Floats shrink = exp2(broadcast(before) - top);
        maxima[m] = now;
        totals[m] *= shrink[0];
        float* target = out + m * stride;
        for (int64_t i = 0; i < features; i += kLanes) store(target + i, load(target + i) * shrink);
      }
      totals[m] += sum_of(sum);
    }
    clear_around(span, keys, row);
  }
}

// Turns scores into probabilities, and gradients of probabilities into gradients of the products.
void differentiate(const Block& block, const Constants& constants, const float* lse,
                   const float* delta, float* scores, float* grads) {
  const int64_t keys = pad_to_lanes(block.keys);
  for (int64_t m = 0; m < block.rows; ++m) {
    float* row = scores + m * kKeyStride;
    float* grad = grads + m * kKeyStride;
    const Span span = visible_span(block, m, row);
    const Floats total = broadcast(lse[m]), mean = broadcast(delta[m]);
    for (int64_t n = span.begin; n < span.end; n += kLanes) {
      const Floats product = load(row + n);
      if (constants.capped) {
        const Floats tanh = Constants::tanh(product);
        const Floats weight = exp2(broadcast(constants.cap) * tanh - total);
        store(row + n, weight);
        store(grad + n, weight * (load(grad + n) - mean) * (broadcast(1.0f) - tanh * tanh));
      } else {
        const Floats weight = exp2(product - total);
        store(row + n, weight);
        store(grad + n, weight * (load(grad + n) - mean));
      }
    }
    // From the visible keys on, not the span: what a masked key holds may be NaN.
    const Span visible{block.first[m], block.last[m]};
    clear_around(visible, keys, row);
    clear_around(visible, keys, grad);
  }
}

// out and lse for the task's queries, over all keys they see.
void attention_forward(const Attention& a, const AttentionTask& task, float* scratch) {
  const Constants constants(a);
  const Segment& segment = task.segment;
  const int64_t heads = a.heads_each(), head = task.group * heads;
  const int64_t features = a.head_dim, padded = pad_to_lanes(features);
  const int64_t stride = a.feature_stride();
  const int64_t queries = task.last_query - task.first_query, rows = queries * heads;
  float* query = scratch;
  float* out = query + rows * stride;
  float* key_rows = out + rows * stride;
  float* value = key_rows + Attention::kKeys * stride;
  float* key = value + Attention::kKeys * stride;
  float* scores = key + features * kKeyStride;
  float* maxima = scores + a.block_rows() * kKeyStride;
  float* totals = maxima + rows;
  Block block{0, 0, reinterpret_cast<int32_t*>(totals + rows), nullptr};
  block.last = block.first + a.block_rows();

  const Piece owned{segment.query + task.first_query, queries, head, heads};
  load_rows(a.dtype, a.q, owned, features, constants.query_factor, query, stride);
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
    load_rows(a.dtype, a.k, seen, features, 1.0f, key_rows, stride);
    transpose(key_rows, stride, keys, features, key);
    load_rows(a.dtype, a.v, seen, features, 1.0f, value, stride);
    for (int64_t i = task.first_query; i < task.last_query; i += a.block_queries()) {
      const int64_t stop = smaller(i + a.block_queries(), task.last_query);
      if (!see(a, segment, i, stop, n, block)) continue;
      const int64_t row = (i - task.first_query) * heads;
      multiply_visible(block, query + row * stride, stride, key, features, scores);
      soften(block, constants, padded, stride, scores, maxima + row, totals + row,
             out + row * stride);
      add_weighted_keys(block, scores, value, padded, stride, out + row * stride);
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
void attention_backward(const Attention& a, const AttentionTask& task, float* scratch) {
  const Constants constants(a);
  const Segment& segment = task.segment;
  const int64_t heads = a.heads_each(), head = task.group * heads;
  const int64_t features = a.head_dim, padded = pad_to_lanes(features);
  const int64_t stride = a.feature_stride(), panel = Attention::kKeys * stride;
  float* query = scratch;
  float* grad_out = query + a.block_rows() * stride;
  float* key_rows = grad_out + a.block_rows() * stride;
  float* grad_key = key_rows + panel;
  float* grad_value = grad_key + panel;
  float* key = grad_value + panel;
  float* value = key + features * kKeyStride;
  float* scores = value + features * kKeyStride;
  float* grads = scores + a.block_rows() * kKeyStride;
  float* lse = grads + a.block_rows() * kKeyStride;
  float* delta = lse + a.block_rows();
  Block block{0, 0, reinterpret_cast<int32_t*>(delta + a.block_rows()), nullptr};
  block.last = block.first + a.block_rows();
  float* grad_query = reinterpret_cast<float*>(block.last + a.block_rows());

  const int64_t queries = task.last_query - task.first_query;
  if (task.writes_queries) {
    for (int64_t i = 0; i < queries * heads * stride; ++i) grad_query[i] = 0.0f;
  }
  for (int64_t n = task.first_key; n < task.last_key; n += Attention::kKeys) {
    const int64_t keys = smaller(Attention::kKeys, segment.num_keys - n);
    const Piece seen{segment.key + n, keys, task.group, 1};
    load_rows(a.dtype, a.v, seen, features, 1.0f, key_rows, stride);
    transpose(key_rows, stride, keys, features, value);
    load_rows(a.dtype, a.k, seen, features, 1.0f, key_rows, stride);
    transpose(key_rows, stride, keys, features, key);
    if (task.writes_keys) {
      for (int64_t i = 0; i < 2 * panel; ++i) grad_key[i] = 0.0f;  // and grad_value
    }
    for (int64_t i = task.first_query; i < task.last_query; i += a.block_queries()) {
      const int64_t stop = smaller(i + a.block_queries(), task.last_query);
      if (!see(a, segment, i, stop, n, block)) continue;
      const Piece rows{segment.query + i, stop - i, head, heads};
      load_rows(a.dtype, a.q, rows, features, constants.query_factor, query, stride);
      load_rows(a.dtype, a.grad, rows, features, 1.0f, grad_out, stride);
      for (int64_t m = 0; m < block.rows; ++m) {
        const int64_t at = (head + m % heads) * a.num_queries + rows.token + m / heads;
        lse[m] = a.lse[at] * kLog2E;
        delta[m] = a.delta[at];
      }
      multiply_visible(block, query, stride, key, features, scores);
      multiply_visible(block, grad_out, stride, value, features, grads);
      differentiate(block, constants, lse, delta, scores, grads);
      if (task.writes_keys) {
        add_weighted_rows(block, scores, grad_out, padded, stride, grad_value);
        add_weighted_rows(block, grads, query, padded, stride, grad_key);
      }
      if (task.writes_queries) {
        add_weighted_keys(block, grads, key_rows, padded, stride,
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

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
