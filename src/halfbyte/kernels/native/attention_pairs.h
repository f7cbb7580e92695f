// Attention in bfloat16 where one instruction multiplies two pairs of bfloat16 numbers and adds
// both products to a float (pairs.h).
//
// Queries, keys, values and the gradient of the output are multiplied as they are. Weights, and
// gradients of scores, are rounded to bfloat16 before they are multiplied; all sums, exponentials
// and the log-sum-exp are those of floats. Included by the AVX-512 source alone.

#pragma once

#include "attention_softmax.h"
#include "pairs.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Lanes of the register that begins at key n which are among keys [first, last).
Ints lanes_within(int64_t n, int64_t first, int64_t last) {
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (lane >= int32_t(first - n)) & (lane < int32_t(last - n));
}

// 16 floats as bfloat16 next to each other, and two rows of them as pairs.
void store_row(void* p, Floats v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
void store_column(Pair* p, Floats earlier, Floats later) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(later, earlier);
  const __m512i order = _mm512_loadu_si512(kInterleave);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, rounded));
}

// Where the rows of a piece stand, one after the other.
class RowReader {
 public:
  RowReader(const Heads& source, const Piece& piece, int64_t features)
      : source_(source),
        piece_(piece),
        features_(features),
        token_(static_cast<const uint16_t*>(source.data) + piece.token * source.token_stride +
               piece.head * source.head_stride) {}

  const uint16_t* next() {
    const uint16_t* row = token_ + head_ * source_.head_stride;
    // Rows of other heads lie between ours, which is more than the processor foresees.
    constexpr int64_t kTokensAhead = 4;
    const int64_t ahead = smaller(kTokensAhead, piece_.tokens - 1 - at_) * source_.token_stride;
    for (int64_t i = 0; i < features_; i += 32) __builtin_prefetch(row + ahead + i);
    if (++head_ == piece_.heads) {
      head_ = 0;
      ++at_;
      token_ += source_.token_stride;
    }
    return row;
  }

 private:
  const Heads& source_;
  const Piece& piece_;
  const int64_t features_;
  const uint16_t* token_;
  int64_t at_ = 0, head_ = 0;
};

struct PairProducts {
  using Unit = Pair;
  static constexpr bool kScaled = false;

  static void load_rows(const Attention& a, const Heads& source, const Piece& piece, float,
                        Pair* rows) {
    RowReader reader(source, piece, a.head_dim);
    for (int64_t m = 0; m < piece.tokens * piece.heads; ++m, rows += a.feature_stride()) {
      pair_adjacent(reader.next(), a.head_dim, rows);
    }
  }

  // An odd last row is paired with zeros; zeros up to a whole number of registers.
  static void load_columns(const Attention& a, const Heads& source, const Piece& piece,
                           Pair* columns) {
    RowReader reader(source, piece, a.head_dim);
    const int64_t rows = piece.tokens * piece.heads, padded = pad_to_lanes(a.head_dim);
    for (int64_t m = 0; m < rows; m += 2, columns += a.feature_stride()) {
      const uint16_t* earlier = reader.next();
      pair_rows(earlier, m + 1 < rows ? reader.next() : nullptr, a.head_dim, columns);
      for (int64_t i = a.head_dim; i < padded; ++i) columns[i] = 0;
    }
  }

  // As `transpose`, in squares of registers.
  static void load_keys(const Attention& a, const Heads& source, const Piece& piece, Pair* rows,
                        Pair* keys) {
    const int64_t stride = a.feature_stride(), units = units_for<Pair>(a.head_dim);
    load_rows(a, source, piece, 1.0f, rows);
    for (int64_t n = 0; n < piece.tokens; n += kLanes) {
      for (int64_t i = 0; i < units; i += kLanes) {
        Floats square[kLanes] = {};
        const int64_t count = smaller(kLanes, piece.tokens - n);
        for (int64_t m = 0; m < count; ++m) square[m] = load_units(rows + (n + m) * stride + i);
        transpose(square);
        for (int64_t m = 0; m < smaller(kLanes, units - i); ++m) {
          store_units(keys + (i + m) * kKeyStride + n, square[m]);
        }
      }
    }
  }

  // As `soften_floats`. The weights of a row take the place of its scores, in half the room.
  static void soften(const Block& block, const Constants& constants, int64_t features,
                     int64_t stride, float* scores, float* maxima, float* totals, float* out) {
    const int64_t keys = pad_to_lanes(block.keys);
    for (int64_t m = 0; m < block.rows; ++m) {
      const int64_t first = block.first[m], last = block.last[m];
      const int64_t begin = first / kLanes * kLanes,
                    end = first < last ? pad_to_lanes(last) : begin;
      float* row = scores + m * kKeyStride;
      auto* weights = reinterpret_cast<uint16_t*>(row);
      if (begin < end) {
        Floats most = broadcast(kMinusInfinity);
        for (int64_t n = begin; n < end; n += kLanes) {
          Floats score = load(row + n) * broadcast(constants.score_factor);
          if (constants.capped) score = broadcast(constants.cap) * Constants::tanh(score);
          score = lanes_within(n, first, last) ? score : broadcast(kMinusInfinity);
          store(row + n, score);
          most = larger(score, most);
        }
        const float here = largest_of(most), before = maxima[m];
        const float now = here > before ? here : before;
        Floats sum{};
        for (int64_t n = begin; n < end; n += kLanes) {
          const Floats weight = exp2(load(row + n) - broadcast(now));
          store_row(weights + n, weight);
          sum += weight;
        }
        if (now != before) rescale(now, features, maxima[m], totals[m], out + m * stride);
        totals[m] += sum_of(sum);
      }
      for (int64_t n = 0; n < begin; n += kLanes) store_row(weights + n, Floats{});
      for (int64_t n = end; n < keys; n += kLanes) store_row(weights + n, Floats{});
    }
  }

  // As `differentiate_floats`, two rows at a time. Their probabilities take the place of scores as
  // pairs of rows, as do the gradients of products; these stand in `grad_rows` as well, by keys.
  static void differentiate(const Block& block, const Constants& constants, const float* lse,
                            const float* delta, float* scores, float* grads, Pair* grad_rows) {
    const int64_t keys = pad_to_lanes(block.keys);
    for (int64_t m = 0; m < block.rows; m += 2) {
      auto* weight_column = reinterpret_cast<Pair*>(scores) + m / 2 * kKeyStride;
      auto* grad_column = reinterpret_cast<Pair*>(grads) + m / 2 * kKeyStride;
      for (int64_t n = 0; n < keys; n += kLanes) {
        Floats weights[2] = {}, slopes[2] = {};
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t row = m + i;
          if (row == block.rows) break;
          const int64_t first = block.first[row], last = block.last[row];
          if (first < n + kLanes && last > n) {
            const Ints visible = lanes_within(n, first, last);
            const Floats product = load(scores + row * kKeyStride + n);
            const Floats grad = load(grads + row * kKeyStride + n) - broadcast(delta[row]);
            differentiate(constants, product, broadcast(lse[row]), grad, weights[i], slopes[i]);
            weights[i] = visible ? weights[i] : Floats{};
            slopes[i] = visible ? slopes[i] : Floats{};
          }
          store_row(reinterpret_cast<uint16_t*>(grad_rows + row * kKeyStride) + n, slopes[i]);
        }
        store_column(weight_column + n, weights[0], weights[1]);
        store_column(grad_column + n, slopes[0], slopes[1]);
      }
    }
  }

  // Of 16 keys; `grad` is the gradient of a weight less their mean.
  static void differentiate(const Constants& constants, Floats product, Floats lse, Floats grad,
                            Floats& weight, Floats& slope) {
    const Floats score = product * broadcast(constants.score_factor);
    if (constants.capped) {
      const Floats tanh = Constants::tanh(score);
      weight = exp2(broadcast(constants.cap) * tanh - lse);
      slope = weight * grad * (broadcast(1.0f) - tanh * tanh);
    } else {
      weight = exp2(score - lse);
      slope = weight * grad;
    }
  }
};

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
