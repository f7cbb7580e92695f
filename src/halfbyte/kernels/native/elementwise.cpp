// The operators of halfbyte/kernels/elementwise.py for the CPU: check, cut into rows, call the
// kernels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "activations.h"
#include "checks.h"
#include "dispatch.h"
#include "parallel.h"
#include "workspace.h"

namespace halfbyte {
namespace {

// Elements that a thread should get at least: about 10 microseconds of work.
constexpr int64_t kGrain = 1 << 14;
// Rows whose gradients of the weight are summed one after the other: it fixes the order.
constexpr int64_t kSummedRows = 64;

// Calls body(begin, end) over [0, count).
template <typename Body>
void over_rows(int64_t count, int64_t elements_each, const Body& body) {
  run_range(count, kGrain / std::max<int64_t>(1, elements_each), body);
}

void expect_like(const Tensor& t, const char* name, const Tensor& x, Problems& problems) {
  const bool fits = problems.expect_vector(t, name, x.scalar_type(), x.numel());
  if (fits) {
    problems.expect(
        std::equal(t.sizes().begin(), t.sizes().end(), x.sizes().begin(), x.sizes().end()), name,
        text("the shape ", describe(x)), describe(t));
  }
}

// The rows of x, checked, but for where results go.
NormRows check_norm(const Tensor& x, const Tensor& weight, double eps, Problems& problems) {
  const int64_t features = x.defined() && x.dim() ? x.size(x.dim() - 1) : 0;
  problems.expect_float(x, "x", /*contiguous=*/true);
  problems.expect_positive(features, "features");
  problems.expect_vector(weight, "weight", ScalarType::Float, features);
  problems.raise();
  NormRows rows{};
  rows.dtype = *dtype_of(x);
  rows.features = features;
  rows.eps = float(eps);
  rows.weight = static_cast<const float*>(weight.const_data_ptr());
  rows.x = x.const_data_ptr();
  return rows;
}

void run_norm(const NormRows& rows, const Tensor& x) {
  const Kernels& with = kernels();
  over_rows(x.numel() / rows.features, rows.features,
            [&](int64_t begin, int64_t end) { with.rms_norm(rows, begin, end); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Problems problems("halfbyte::rms_norm");
  NormRows rows = check_norm(x, weight, eps, problems);
  const Tensor out = activation_like(x);
  rows.out = out.mutable_data_ptr();
  run_norm(rows, x);
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& update, const Tensor& weight,
                                        double eps) {
  Problems problems("halfbyte::add_rms_norm");
  NormRows rows = check_norm(x, weight, eps, problems);
  expect_like(update, "update", x, problems);
  problems.raise();
  const Tensor sum = activation_like(x);
  const Tensor out = activation_like(x);
  rows.update = update.const_data_ptr();
  rows.sum = sum.mutable_data_ptr();
  rows.out = out.mutable_data_ptr();
  run_norm(rows, x);
  return {sum, out};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight,
                                             const std::optional<Tensor>& carry, double eps,
                                             bool want_weight) {
  Problems problems("halfbyte::rms_norm_backward");
  NormRows rows = check_norm(x, weight, eps, problems);
  expect_like(grad, "grad", x, problems);
  if (carry.has_value()) expect_like(*carry, "carry", x, problems);
  problems.raise();
  const int64_t features = rows.features, count = x.numel() / features;
  const Tensor grad_x = activation_like(x);
  const Tensor grad_weight = torch::stable::new_empty(weight, {want_weight ? features : 0});
  rows.grad = grad.const_data_ptr();
  rows.carry = carry.has_value() ? carry->const_data_ptr() : nullptr;
  rows.grad_x = grad_x.mutable_data_ptr();
  const Kernels& with = kernels();
  if (!want_weight) {
    over_rows(count, features, [&](int64_t begin, int64_t end) {
      with.rms_norm_backward(rows, begin, end, nullptr);
    });
    return {grad_x, grad_weight};
  }
  const int64_t blocks = ceil_div(count, kSummedRows);
  const Workspace workspace(blocks * features * int64_t(sizeof(float)));
  auto* sums = static_cast<float*>(workspace.data());
  over_rows(blocks, kSummedRows * features, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* sum = sums + b * features;
      std::fill_n(sum, features, 0.0f);
      with.rms_norm_backward(rows, b * kSummedRows, std::min(count, (b + 1) * kSummedRows), sum);
    }
  });
  auto* total = static_cast<float*>(grad_weight.mutable_data_ptr());
  std::fill_n(total, features, 0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < features; ++i) total[i] += sums[b * features + i];
  }
  return {grad_x, grad_weight};
}

void rotate(Tensor& x, const Tensor& cosine, const Tensor& sine, bool inverse) {
  Problems problems("halfbyte::rotate_");
  problems.expect(x.defined() && x.dim() == 3 && x.size(2) % 2 == 0, "x", "[T, H, 2 F]",
                  describe(x));
  problems.raise();
  const int64_t tokens = x.size(0), heads = x.size(1), half = x.size(2) / 2;
  problems.expect_float(x, "x", /*contiguous=*/false);
  // Heads that overlap would be turned twice.
  const bool heads_apart = heads == 1 || x.stride(1) >= 2 * half;
  const bool tokens_apart = tokens == 1 || x.stride(0) >= (heads - 1) * x.stride(1) + 2 * half;
  const bool apart = x.numel() == 0 || (x.stride(2) == 1 && heads_apart && tokens_apart);
  problems.expect(apart, "x", "consecutive features, heads and tokens apart", describe(x));
  problems.expect_vector(cosine, "cosine", ScalarType::Float, tokens * half);
  problems.expect_vector(sine, "sine", ScalarType::Float, tokens * half);
  problems.raise();
  const Rotation turn{*dtype_of(x),
                      x.mutable_data_ptr(),
                      x.stride(0),
                      x.stride(1),
                      heads,
                      half,
                      static_cast<const float*>(cosine.const_data_ptr()),
                      static_cast<const float*>(sine.const_data_ptr()),
                      inverse};
  const Kernels& with = kernels();
  over_rows(tokens, 2 * heads * half,
            [&](int64_t begin, int64_t end) { with.rotate(turn, begin, end); });
}

// Elements between rows of features, or nothing if rows are not one distance apart.
std::optional<int64_t> row_stride(const Tensor& t) {
  if (t.is_contiguous()) return t.size(t.dim() - 1);
  if (t.dim() == 2 && t.stride(1) == 1) return t.stride(0);
  return std::nullopt;
}

// Gate and up, checked, but for where results go.
GatedRows check_gated(const Tensor& gate, const Tensor& up, const std::string& activation,
                      Problems& problems) {
  problems.expect_float(gate, "gate", /*contiguous=*/false);
  problems.expect(gate.defined() && gate.dim() >= 1, "gate", "at least one dimension",
                  describe(gate));
  problems.expect(activation == "silu" || activation == "gelu_pytorch_tanh", "activation",
                  "silu or gelu_pytorch_tanh", activation);
  problems.raise();
  const bool same =
      up.defined() && up.is_cpu() && up.scalar_type() == gate.scalar_type() && is_aligned(up) &&
      std::equal(gate.sizes().begin(), gate.sizes().end(), up.sizes().begin(), up.sizes().end());
  problems.expect(same, "up", text("aligned, on the CPU, and like gate ", describe(gate)),
                  describe(up));
  problems.raise();
  const auto gate_stride = row_stride(gate), up_stride = row_stride(up);
  const char* rows_of = "contiguous, or [T, I] with consecutive features";
  problems.expect(gate_stride.has_value(), "gate", rows_of, describe(gate));
  problems.expect(up_stride.has_value(), "up", rows_of, describe(up));
  problems.raise();
  GatedRows rows{};
  rows.dtype = *dtype_of(gate);
  rows.gelu = activation != "silu";
  rows.features = gate.size(gate.dim() - 1);
  rows.gate = gate.const_data_ptr();
  rows.gate_stride = *gate_stride;
  rows.up = up.const_data_ptr();
  rows.up_stride = *up_stride;
  return rows;
}

int64_t count_rows(const Tensor& t, int64_t features) {
  return features == 0 ? 0 : t.numel() / features;
}

Tensor gated(const Tensor& gate, const Tensor& up, std::string activation) {
  Problems problems("halfbyte::gated");
  GatedRows rows = check_gated(gate, up, activation, problems);
  const Tensor out = activation_like(gate);
  rows.out = out.mutable_data_ptr();
  const Kernels& with = kernels();
  over_rows(count_rows(gate, rows.features), rows.features,
            [&](int64_t begin, int64_t end) { with.gated(rows, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                          std::string activation) {
  Problems problems("halfbyte::gated_backward");
  GatedRows rows = check_gated(gate, up, activation, problems);
  expect_like(grad, "grad", gate, problems);
  problems.raise();
  const Tensor grad_gate = activation_like(gate);
  const Tensor grad_up = activation_like(gate);
  rows.grad = grad.const_data_ptr();
  rows.grad_gate = grad_gate.mutable_data_ptr();
  rows.grad_up = grad_up.mutable_data_ptr();
  const Kernels& with = kernels();
  over_rows(count_rows(gate, rows.features), rows.features,
            [&](int64_t begin, int64_t end) { with.gated_backward(rows, begin, end); });
  return {grad_gate, grad_up};
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("rotate_", TORCH_BOX(&rotate));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("gated_backward", TORCH_BOX(&gated_backward));
}

}  // namespace
}  // namespace halfbyte
