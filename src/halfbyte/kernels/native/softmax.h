// Softmax cross-entropy of a row of logits, and its gradient in place. Included once in the
// namespace of each instruction set.

#pragma once

#include <cmath>

#include "lanes.h"
#include "plain.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Registers summed side by side, so that one sum does not wait for the last.
constexpr int kChains = 4;
constexpr int64_t kStride = kChains * kLanes;
constexpr float kLog2OfE = 0x1.715476p0f;

float row_maximum(const float* row, int64_t count) {
  float best = row[0];
  int64_t i = 0;
  if (count >= kStride) {
    Floats chains[kChains];
    for (int c = 0; c < kChains; ++c) chains[c] = load(row + c * kLanes);
    for (i = kStride; i + kStride <= count; i += kStride) {
      for (int c = 0; c < kChains; ++c) chains[c] = larger(load(row + i + c * kLanes), chains[c]);
    }
    for (const Floats& chain : chains) {
      const float each = largest_of(chain);
      best = each > best ? each : best;
    }
  }
  for (; i < count; ++i) best = row[i] > best ? row[i] : best;
  return best;
}

// Replaces each element by e^(element - maximum); returns the sum of them.
float exponentiate(float* row, int64_t count, float maximum) {
  const Floats factor = broadcast(kLog2OfE);
  Floats chains[kChains] = {};
  int64_t i = 0;
  for (; i + kStride <= count; i += kStride) {
    for (int c = 0; c < kChains; ++c) {
      float* at = row + i + c * kLanes;
      const Floats e = exp2((load(at) - broadcast(maximum)) * factor);
      store(at, e);
      chains[c] += e;
    }
  }
  float total = 0.0f;
  for (const Floats& chain : chains) total += sum_of(chain);
  for (; i < count; i += kLanes) {
    const int64_t rest = smaller(kLanes, count - i);
    float lanes[kLanes] = {};
    for (int64_t j = 0; j < rest; ++j) lanes[j] = row[i + j];
    store(lanes, exp2((load(lanes) - broadcast(maximum)) * factor));
    for (int64_t j = 0; j < rest; ++j) {
      row[i + j] = lanes[j];
      total += lanes[j];
    }
  }
  return total;
}

void cross_entropy(float* logits, const int64_t* targets, int64_t begin, int64_t end,
                   int64_t classes, float grad_scale, float* losses) {
  for (int64_t r = begin; r < end; ++r) {
    float* row = logits + r * classes;
    const float picked = row[targets[r]];
    const float maximum = row_maximum(row, classes);
    const float total = exponentiate(row, classes, maximum);
    losses[r] = std::log(total) + (maximum - picked);
    const float factor = grad_scale / total;
    for (int64_t i = 0; i < classes; ++i) row[i] *= factor;
    row[targets[r]] -= grad_scale;
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
