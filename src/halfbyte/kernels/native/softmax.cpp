// cross_entropy_ of halfbyte/kernels/cross_entropy.py for the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "dispatch.h"
#include "parallel.h"

namespace halfbyte {
namespace {

Tensor cross_entropy_(Tensor& logits, const Tensor& targets, double grad_scale) {
  Problems problems("halfbyte::cross_entropy_");
  const bool matrix = logits.defined() && logits.dim() == 2 && logits.size(1) >= 1;
  problems.expect(matrix, "logits", "a matrix with a column", describe(logits));
  problems.raise();
  const int64_t rows = logits.size(0);
  const int64_t classes = logits.size(1);
  problems.expect_vector(logits, "logits", ScalarType::Float, rows * classes);
  problems.expect_vector(targets, "targets", ScalarType::Long, rows);
  problems.raise();
  const auto* picked = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t r = 0; r < rows; ++r) {
    problems.expect(picked[r] >= 0 && picked[r] < classes, "targets", text("0 to ", classes - 1),
                    picked[r]);
    problems.raise();
  }
  const Tensor losses = torch::stable::new_empty(logits, {rows});
  const Kernels& with = kernels();
  auto* values = static_cast<float*>(logits.mutable_data_ptr());
  auto* out = static_cast<float*>(losses.mutable_data_ptr());
  run_range(rows, 1, [&](int64_t begin, int64_t end) {
    with.cross_entropy(values, picked, begin, end, classes, static_cast<float>(grad_scale), out);
  });
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}

}  // namespace halfbyte
