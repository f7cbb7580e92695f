// linear_4bit and its input gradient: which way to multiply, and the workspace of the long way.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <vector>

#include "activations.h"
#include "parallel.h"
#include "products.h"
#include "quantized_arguments.h"
#include "thread_memory.h"

namespace halfbyte {
namespace {

// Outputs that a thread takes at least, and their unit: tiles are 4 wide.
constexpr int64_t kOutputUnit = 4;
constexpr int64_t kWeightGrain = 1 << 17;  // weights a thread should get at least
constexpr int64_t kCopyGrain = 1 << 15;    // elements of x
constexpr int64_t kSlab = 256;             // rows for which a weight is decoded once

void multiply_slab(const Quantized& weight, const LinearShape& shape, DType dtype, const void* x,
                   const void* bias, void* y) {
  const Kernels& with = kernels();
  void* prepared = thread_memory<char>(with.prepared_bytes(weight, shape, dtype));
  const int64_t rows_each = std::max<int64_t>(1, kCopyGrain / shape.in_features);
  const auto prepare = [&](int64_t b, int64_t e) {
    with.prepare(weight, shape, dtype, x, b, e, prepared);
  };
  if (shape.rows <= rows_each) {
    prepare(0, shape.rows);  // not worth waking a thread
  } else {
    torch::stable::parallel_for(0, shape.rows, rows_each, prepare);
  }
  const int64_t units = ceil_div(shape.out_features, kOutputUnit);
  const int64_t grain =
      std::max<int64_t>(1, kWeightGrain / (kOutputUnit * shape.in_features * shape.rows));
  run_range(units, grain, [&](int64_t b, int64_t e) {
    with.linear(weight, shape, dtype, prepared, b * kOutputUnit,
                std::min(e * kOutputUnit, shape.out_features), bias, y);
  });
}

// A slab at a time, which bounds the memory for prepared rows and sums.
void multiply_fused(const Quantized& weight, const LinearShape& shape, DType dtype, const Tensor& x,
                    const std::optional<Tensor>& bias, const Tensor& y) {
  const auto element = static_cast<int64_t>(x.element_size());
  const auto* source = static_cast<const char*>(x.const_data_ptr());
  auto* target = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t row = 0; row < shape.rows; row += kSlab) {
    const LinearShape slab{std::min(kSlab, shape.rows - row), shape.in_features,
                           shape.out_features};
    multiply_slab(weight, slab, dtype, source + row * shape.in_features * element,
                  bias.has_value() ? bias->const_data_ptr() : nullptr,
                  target + row * shape.out_features * element);
  }
}

void call(const char* op, const char* overload, StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
}

// a @ b into `out`, by PyTorch.
void matmul_into(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  call("aten::mm", "out", stack.data());
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result's reference
}

// x @ weight^T + bias into `out`, by PyTorch.
void linear_into(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(std::optional<Tensor>(bias)),
                                    from(out)};
  call("aten::linear", "out", stack.data());
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Columns [begin, end) of weight rows [first, last) into `out`, dense.
void decode(const Quantized& weight, int64_t in_features, int64_t first, int64_t last,
            int64_t begin, int64_t end, DType dtype, Tensor& out) {
  const Kernels& with = kernels();
  const int64_t width = end - begin;
  const auto element = static_cast<int64_t>(out.element_size());
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  if (width == in_features) {  // one run, cut at whole blocks
    const int64_t from = first * in_features;
    const int64_t to = last * in_features;
    const int64_t block = weight.block_size;
    const int64_t first_block = from / block;
    torch::stable::parallel_for(first_block, ceil_div(to, block),
                                std::max<int64_t>(1, kCopyGrain / block),
                                [&](int64_t b, int64_t e) {
                                  const int64_t run_begin = std::max(b * block, from);
                                  const int64_t run_end = std::min(e * block, to);
                                  with.dequantize_4bit(weight, run_begin, run_end, dtype,
                                                       target + (run_begin - from) * element);
                                });
    return;
  }
  torch::stable::parallel_for(
      first, last, std::max<int64_t>(1, kCopyGrain / width), [&](int64_t b, int64_t e) {
        for (int64_t row = b; row < e; ++row) {
          with.dequantize_4bit(weight, row * in_features + begin, row * in_features + end, dtype,
                               target + (row - first) * width * element);
        }
      });
}

Tensor columns(const Tensor& t, int64_t begin, int64_t end) {
  auto whole = t;
  return begin == 0 && end == t.size(1) ? whole
                                        : torch::stable::narrow(whole, 1, begin, end - begin);
}

void multiply_through_workspace(const Quantized& weight, const LinearShape& shape, const Tensor& x,
                                const std::optional<Tensor>& bias, const Tensor& y) {
  const int64_t row_bytes = shape.in_features * static_cast<int64_t>(x.element_size());
  const int64_t chunk = std::clamp<int64_t>(workspace_limit() / row_bytes, 1, shape.out_features);
  const Workspace workspace(chunk * row_bytes);
  for (int64_t n = 0; n < shape.out_features; n += chunk) {
    const int64_t last = std::min(n + chunk, shape.out_features);
    Tensor decoded = workspace.view(last - n, shape.in_features, x);
    decode(weight, shape.in_features, n, last, 0, shape.in_features, *dtype_of(x), decoded);
    const Tensor target = columns(y, n, last);
    if (bias.has_value()) {
      auto offsets = *bias;
      linear_into(x, decoded, torch::stable::narrow(offsets, 0, n, last - n), target);
    } else {
      matmul_into(x, torch::stable::transpose(decoded, 0, 1), target);
    }
  }
}

// The product of what x should be, checked: in_features of `x` and whole sizes.
LinearShape shape_of(const Tensor& x, const char* name, int64_t width, int64_t out_features,
                     int64_t in_features, Problems& problems) {
  problems.expect_float(x, name, /*contiguous=*/false);
  problems.expect_positive(out_features, "out_features");
  problems.expect_positive(in_features, "in_features");
  const bool fits = x.defined() && x.dim() >= 1 && x.size(x.dim() - 1) == width;
  problems.expect(fits, name, text("a last dimension of ", width), describe(x));
  int64_t numel = 0;
  problems.expect(!__builtin_mul_overflow(out_features, in_features, &numel), "out_features",
                  "a weight that fits into memory", "one that does not");
  problems.raise();
  return {x.numel() / width, in_features, out_features};
}

Tensor with_last_dimension(const Tensor& x, int64_t size) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = size;
  return activation(x, std::move(sizes));
}

Tensor as_matrix(const Tensor& t, int64_t rows, int64_t width) {
  return torch::stable::view(t, {rows, width});
}

Tensor linear_4bit(const Tensor& x, const Tensor& codes, const Tensor& table, const Tensor& scales,
                   const std::optional<Tensor>& nested_table,
                   const std::optional<Tensor>& nested_scales, double nested_offset,
                   int64_t nested_block_size, int64_t block_size, int64_t out_features,
                   int64_t in_features, const std::optional<Tensor>& bias) {
  Problems problems("halfbyte::linear_4bit");
  const LinearShape shape = shape_of(x, "x", in_features, out_features, in_features, problems);
  if (bias.has_value()) {
    problems.expect_vector(*bias, "bias", x.scalar_type(), out_features);
  }
  const QuantizedArguments arguments{
      codes,     table, scales, nested_table, nested_scales, nested_offset, nested_block_size,
      block_size};
  const Quantized weight = arguments.view(out_features * in_features, problems);

  const Tensor dense = torch::stable::contiguous(x);
  const Tensor y = with_last_dimension(x, out_features);
  const DType dtype = *dtype_of(x);
  if (shape.rows == 0) return y;
  if (shape.rows <= kernels().few_rows[static_cast<int>(dtype)]) {
    multiply_fused(weight, shape, dtype, dense, bias, y);
  } else if (gemm_preferred(dtype)) {
    const Operand rows{
        {dense.const_data_ptr(), dtype, in_features}, false, shape.rows, in_features};
    const void* offsets = bias.has_value() ? bias->const_data_ptr() : nullptr;
    multiply_by_transposed_weight(rows, weight, out_features,
                                  {y.mutable_data_ptr(), dtype, out_features, 1.0f, 0.0f, offsets});
  } else {
    multiply_through_workspace(weight, shape, as_matrix(dense, shape.rows, in_features), bias,
                               as_matrix(y, shape.rows, out_features));
  }
  return y;
}

Tensor linear_4bit_input_gradient(const Tensor& gradient, const Tensor& codes, const Tensor& table,
                                  const Tensor& scales, const std::optional<Tensor>& nested_table,
                                  const std::optional<Tensor>& nested_scales, double nested_offset,
                                  int64_t nested_block_size, int64_t block_size,
                                  int64_t out_features, int64_t in_features) {
  Problems problems("halfbyte::linear_4bit_input_gradient");
  const LinearShape shape =
      shape_of(gradient, "gradient", out_features, out_features, in_features, problems);
  const QuantizedArguments arguments{
      codes,     table, scales, nested_table, nested_scales, nested_offset, nested_block_size,
      block_size};
  const Quantized weight = arguments.view(out_features * in_features, problems);

  const Tensor dense = as_matrix(torch::stable::contiguous(gradient), shape.rows, out_features);
  const Tensor result = with_last_dimension(gradient, in_features);
  if (shape.rows == 0) return result;
  if (const DType dtype = *dtype_of(gradient); gemm_preferred(dtype)) {
    const Operand rows{
        {dense.const_data_ptr(), dtype, out_features}, false, shape.rows, out_features};
    multiply_by_weight(rows, weight, in_features,
                       {result.mutable_data_ptr(), dtype, in_features, 1.0f, 0.0f, nullptr});
    return result;
  }
  const Tensor target = as_matrix(result, shape.rows, in_features);
  // Chunks are columns: a sum over rows of W must not be rounded between chunks.
  const int64_t column_bytes = out_features * static_cast<int64_t>(gradient.element_size());
  int64_t chunk = std::clamp<int64_t>(workspace_limit() / column_bytes, 1, in_features);
  if (chunk < in_features && chunk > block_size) chunk -= chunk % block_size;
  const Workspace workspace(chunk * column_bytes);
  for (int64_t k = 0; k < in_features; k += chunk) {
    const int64_t last = std::min(k + chunk, in_features);
    Tensor decoded = workspace.view(out_features, last - k, gradient);
    decode(weight, in_features, 0, out_features, k, last, *dtype_of(gradient), decoded);
    matmul_into(dense, decoded, columns(target, k, last));
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) {
  m.impl("linear_4bit", TORCH_BOX(&linear_4bit));
  m.impl("linear_4bit_input_gradient", TORCH_BOX(&linear_4bit_input_gradient));
}

}  // namespace halfbyte
