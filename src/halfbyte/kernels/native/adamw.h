// The AdamW update in plain loops that every instruction set's compiler vectorises. Included once
// in the namespace of each.
//
// The law, with its fused multiply-adds, is in halfbyte/kernels/adamw.py. Sources are compiled with
// contraction off: what is fused is written as such, and the rest is not.

#pragma once

#include "types.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

template <bool from_moment>
void adamw_moments_loop(const AdamWScalars& s, const float* __restrict grad,
                        float* __restrict exp_avg, float* __restrict exp_avg_sq,
                        float* __restrict root, int64_t count) {
  const float weight1 = from_moment ? s.weight1 : s.weight1 - 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float g = grad[i];
    const float m = exp_avg[i];
    const float v = __builtin_fmaf(s.weight2 * g, g, exp_avg_sq[i] * s.beta2);
    exp_avg[i] = __builtin_fmaf(weight1, g - m, from_moment ? m : g);
    exp_avg_sq[i] = v;
    root[i] = v;
  }
}

void adamw_moments(const AdamWScalars& s, const float* grad, float* exp_avg, float* exp_avg_sq,
                   float* root, int64_t count) {
  // The interpolation starts from the nearer end, as torch.lerp does.
  if (__builtin_fabsf(s.weight1) < 0.5f) {
    adamw_moments_loop<true>(s, grad, exp_avg, exp_avg_sq, root, count);
  } else {
    adamw_moments_loop<false>(s, grad, exp_avg, exp_avg_sq, root, count);
  }
}

void adamw_apply(const AdamWScalars& s, const float* __restrict exp_avg,
                 const float* __restrict root, float* __restrict param, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float denominator = root[i] / s.correction + s.eps;
    param[i] = param[i] * s.decay + s.step_size * exp_avg[i] / denominator;
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
