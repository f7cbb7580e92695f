// The operator of halfbyte/kernels/adamw.py for the CPU: check, cut into ranges, call the kernels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>

#include "checks.h"
#include "dispatch.h"

namespace halfbyte {
namespace {

// Elements between two square roots: what they need stays in the second-level cache.
constexpr int64_t kPiece = 1 << 16;
// Elements a thread should get at least.
constexpr int64_t kGrain = 1 << 13;

// PyTorch's own square root, in place. With MKL it is not the nearest in one case of six, so an
// instruction would not give the bits of torch.optim.AdamW.
void square_root(const Tensor& t) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(t), from(t)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sqrt", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result's reference
}

void adamw_step(Tensor& param, const Tensor& grad, Tensor& exp_avg, Tensor& exp_avg_sq,
                double decay, double weight1, double beta2, double weight2, double correction,
                double eps, double step_size) {
  const int64_t numel = param.numel();
  Problems problems("halfbyte::adamw_step");
  problems.expect_vector(param, "param", ScalarType::Float, numel);
  problems.expect_vector(grad, "grad", ScalarType::Float, numel);
  problems.expect_vector(exp_avg, "exp_avg", ScalarType::Float, numel);
  problems.expect_vector(exp_avg_sq, "exp_avg_sq", ScalarType::Float, numel);
  problems.raise();
  const AdamWScalars scalars{float(decay),      float(weight1), float(beta2),    float(weight2),
                             float(correction), float(eps),     float(step_size)};
  const Kernels& with = kernels();
  const auto* g = static_cast<const float*>(grad.const_data_ptr());
  auto* p = static_cast<float*>(param.mutable_data_ptr());
  auto* m = static_cast<float*>(exp_avg.mutable_data_ptr());
  auto* v = static_cast<float*>(exp_avg_sq.mutable_data_ptr());
  Tensor roots;
  for (int64_t from = 0, length = 0; from < numel; from += length) {
    const int64_t wanted = std::min(kPiece, numel - from);
    if (wanted != length) roots = torch::stable::new_empty(param, {wanted});
    length = wanted;
    auto* r = static_cast<float*>(roots.mutable_data_ptr());
    torch::stable::parallel_for(0, length, kGrain, [&](int64_t b, int64_t e) {
      const int64_t i = from + b;
      with.adamw_moments(scalars, g + i, m + i, v + i, r + b, e - b);
    });
    square_root(roots);
    torch::stable::parallel_for(0, length, kGrain, [&](int64_t b, int64_t e) {
      const int64_t i = from + b;
      with.adamw_apply(scalars, m + i, r + b, p + i, e - b);
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) { m.impl("adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace halfbyte
