// What attention does to a block of scores, in floats: exponentials, their sums, and gradients.

#pragma once

#include "attention_panels.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr float kLog2E = 0x1.715476p0f;
constexpr float kLn2 = 0x1.62e430p-1f;
const float kMinusInfinity = -__builtin_inff();

// What is the same for a whole call.
struct Constants {
  // The products of queries and keys times both of these are scores in powers of two, or with a
  // softcap twice the argument of tanh.
  float query_factor;  // in the queries
  float score_factor;  // in the products
  float key_factor;    // turns sums of score gradients times queries into key gradients
  bool capped;
  float cap;  // softcap * log2(e)

  Constants(const Attention& a, bool scaled_queries)
      : query_factor(a.softcap > 0 ? a.scale / a.softcap * 2 * kLog2E : a.scale * kLog2E),
        score_factor(1.0f),
        key_factor(a.softcap > 0 ? a.softcap * (kLn2 / 2) : kLn2),
        capped(a.softcap > 0),
        cap(a.softcap * kLog2E) {
    if (scaled_queries) return;
    score_factor = query_factor;
    query_factor = 1.0f;
    key_factor = a.scale;
  }

  // tanh(s / softcap) from the product in powers of two.
  static Floats tanh(Floats product) {
    return broadcast(1.0f) - broadcast(2.0f) / (exp2(product) + broadcast(1.0f));
  }
};

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

// Brings a row's sum and outputs to the scale of a larger largest score.
void rescale(float now, int64_t features, float& largest, float& total, float* out) {
  const Floats shrink = exp2(broadcast(largest) - broadcast(now));
  largest = now;
  total *= shrink[0];
  for (int64_t i = 0; i < features; i += kLanes) store(out + i, load(out + i) * shrink);
}

// Turns a block of scores into weights relative to the largest score so far, row by row, and
// brings sums and outputs to the same scale.
void soften_floats(const Block& block, const Constants& constants, int64_t features, int64_t stride,
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
      if (now != before) rescale(now, features, maxima[m], totals[m], out + m * stride);
      totals[m] += sum_of(sum);
    }
    clear_around(span, keys, row);
  }
}

// Turns scores into probabilities, and gradients of probabilities into gradients of the products.
void differentiate_floats(const Block& block, const Constants& constants, const float* lse,
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

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
