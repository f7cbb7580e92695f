// linear_rows and single_query_attention of halfbyte/kernels/decode.py for the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "checks.h"
#include "dispatch.h"
#include "parallel.h"
#include "thread_memory.h"

namespace halfbyte {
namespace {

constexpr int64_t kWeightGrain = 1 << 16;  // weights a thread should get at least
constexpr int64_t kKeyGrain = 1 << 15;     // elements of keys

// As floats, dense.
void widen(const Tensor& x, float* out) {
  const int64_t count = x.numel();
  if (*dtype_of(x) == DType::kFloat32) {
    std::copy_n(static_cast<const float*>(x.const_data_ptr()), count, out);
    return;
  }
  const auto* half = static_cast<const uint16_t*>(x.const_data_ptr());
  const bool brain = *dtype_of(x) == DType::kBFloat16;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = brain ? bfloat16_to_float(half[i]) : float16_to_float(half[i]);
  }
}

Tensor linear_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  Problems problems("halfbyte::linear_rows");
  problems.expect_float(x, "x", /*contiguous=*/false);
  problems.expect_float(weight, "weight", /*contiguous=*/false);
  problems.raise();
  const bool fits = x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                    x.scalar_type() == weight.scalar_type();
  problems.expect(fits, "weight", "matrices x [T, I] and weight [O, I] of one dtype",
                  text(describe(x), " and ", describe(weight)));
  problems.raise();
  const int64_t rows = x.size(0), in_features = x.size(1), out_features = weight.size(0);
  problems.expect(in_features <= 1 || weight.stride(1) == 1, "weight",
                  "adjacent elements in its rows", text("a stride of ", weight.stride(1)));
  if (bias.has_value()) problems.expect_vector(*bias, "bias", x.scalar_type(), out_features);
  problems.raise();

  const Tensor y = torch::stable::new_empty(x, {rows, out_features});
  if (y.numel() == 0) return y;
  float* wide = thread_memory<float>(std::max<int64_t>(1, rows * in_features));
  widen(torch::stable::contiguous(x), wide);
  const DenseRows product{wide,
                          rows,
                          in_features,
                          weight.const_data_ptr(),
                          weight.stride(0),
                          bias.has_value() ? bias->const_data_ptr() : nullptr,
                          y.mutable_data_ptr(),
                          out_features,
                          *dtype_of(weight)};
  const Kernels& with = kernels();
  run_range(out_features, std::max<int64_t>(1, kWeightGrain / (in_features * rows + 1)),
            [&](int64_t begin, int64_t end) { with.dense_rows(product, begin, end); });
  return y;
}

void expect_heads(Problems& problems, const Tensor& t, const char* name, const Tensor& q,
                  const Tensor& keys) {
  const bool good = t.defined() && t.is_cpu() && t.scalar_type() == q.scalar_type() &&
                    t.dim() == 3 && t.size(0) >= 1 && t.size(1) >= 1 && t.size(2) == q.size(1) &&
                    t.size(0) == keys.size(0) && t.size(1) == keys.size(1) &&
                    (t.size(2) <= 1 || t.stride(2) == 1) && is_aligned(t);
  problems.expect(good, name,
                  text("aligned [G, S, ", q.size(1), "] of the dtype of q, features adjacent"),
                  describe(t));
}

Tensor single_query_attention(const Tensor& q, const Tensor& keys, const Tensor& values,
                              double scale, const std::optional<double>& softcap) {
  Problems problems("halfbyte::single_query_attention");
  problems.expect_float(q, "q", /*contiguous=*/true);
  problems.raise();
  problems.expect(q.dim() == 2 && q.numel() > 0, "q", "[H, D]", describe(q));
  problems.raise();
  expect_heads(problems, keys, "keys", q, keys);
  problems.raise();
  expect_heads(problems, values, "values", q, keys);
  problems.expect(q.size(0) % keys.size(0) == 0, "q",
                  text("a multiple of ", keys.size(0), " heads"), describe(q));
  problems.raise();

  const Tensor out = torch::stable::empty_like(q);
  const SingleQuery attention{*dtype_of(q),
                              q.size(0),
                              keys.size(0),
                              q.size(1),
                              keys.size(1),
                              static_cast<float>(scale),
                              static_cast<float>(softcap.value_or(0.0)),
                              q.const_data_ptr(),
                              keys.const_data_ptr(),
                              values.const_data_ptr(),
                              keys.stride(0),
                              keys.stride(1),
                              values.stride(0),
                              values.stride(1),
                              out.mutable_data_ptr()};
  const Kernels& with = kernels();
  const int64_t each = attention.num_keys * attention.head_dim * attention.heads_each();
  run_range(attention.num_groups, std::max<int64_t>(1, kKeyGrain / each),
            [&](int64_t begin, int64_t end) {
              float* scratch = thread_memory<float>(attention.scratch());
              for (int64_t group = begin; group < end; ++group) {
                with.single_query(attention, group, scratch);
              }
            });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) {
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
  m.impl("single_query_attention", TORCH_BOX(&single_query_attention));
}

}  // namespace halfbyte
