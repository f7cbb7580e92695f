// Products of matrices by our own kernels: packing, tasks, and the operators.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>

#include "parallel.h"
#include "products.h"
#include "thread_memory.h"

namespace halfbyte {
namespace {

constexpr int64_t kTasks = 16;                      // wanted at least, where the product is large
constexpr int64_t kThreadGrain = int64_t{1} << 20;  // multiply-adds a thread should get at least
constexpr int64_t kPackGrain = 1 << 15;             // elements

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Blocks as large as the cache takes, or smaller ones when there would be few tasks.
int64_t column_block(int64_t rows, int64_t columns) {
  const int64_t row_blocks = ceil_div(rows, kGemmRows);
  const int64_t wanted = ceil_div(columns * row_blocks, kTasks);
  return std::clamp(round_up(wanted, kGemmColumnUnit), kGemmColumnUnit, kGemmColumns);
}

void run(const Gemm& gemm, int64_t rows, int64_t columns) {
  const int64_t width = column_block(rows, columns);
  const int64_t row_blocks = ceil_div(rows, kGemmRows);
  const Kernels& with = kernels();
  const int64_t useful = rows * columns * gemm.depth / kThreadGrain + 1;
  const int64_t threads = std::min(useful, int64_t(torch::stable::get_num_threads()));
  run_tasks(row_blocks * ceil_div(columns, width), threads, [&](int64_t task, int64_t) {
    const int64_t row = task % row_blocks * kGemmRows;
    const int64_t column = task / row_blocks * width;
    with.gemm_block(
        gemm, {row, std::min(row + kGemmRows, rows), column, std::min(column + width, columns)},
        thread_memory<float>(kGemmScratch));
  });
}

const char* element_at(const View& view, int64_t row, int64_t column) {
  const int64_t bytes = view.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<const char*>(view.data) + (row * view.row_stride + column) * bytes;
}

// Columns [first, last) of a dense b into strips.
void pack(const Operand& b, bool paired, int64_t first, int64_t last, float* strips) {
  const Kernels& with = kernels();
  const int64_t depth = b.rows, terms = paired ? 2 : 1, units = ceil_div(depth, terms);
  if (b.transposed) {
    const int64_t grain = std::max<int64_t>(1, kPackGrain / (kGemmColumnUnit * depth + 1));
    run_range(ceil_div(last - first, kGemmColumnUnit), grain, [&](int64_t begin, int64_t end) {
      const int64_t column = first + begin * kGemmColumnUnit;
      const int64_t columns = std::min(first + end * kGemmColumnUnit, last) - column;
      with.gemm_pack_columns({element_at(b.view, column, 0), b.view.dtype, b.view.row_stride},
                             paired, columns, depth, strips + (column - first) * units);
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kPackGrain / (last - first + 1));
  run_range(units, grain, [&](int64_t begin, int64_t end) {
    const int64_t row = begin * terms;
    with.gemm_pack_rows({element_at(b.view, row, first), b.view.dtype, b.view.row_stride}, paired,
                        row, std::min(end * terms, depth) - row, depth, last - first, strips);
  });
}

// Calls multiply(first, last, strips) for as many columns at a time as the workspace holds, each of
// `units` along the depth.
template <typename Multiply>
void for_column_chunks(int64_t units, int64_t columns, Multiply multiply) {
  const int64_t column_bytes = std::max<int64_t>(1, units) * int64_t(sizeof(float));
  const int64_t fitting = workspace_limit() / column_bytes / kGemmColumnUnit * kGemmColumnUnit;
  const int64_t chunk = std::clamp(fitting, kGemmColumnUnit, round_up(columns, kGemmColumnUnit));
  const Workspace workspace(chunk * column_bytes);
  for (int64_t first = 0; first < columns; first += chunk) {
    multiply(first, std::min(first + chunk, columns), static_cast<float*>(workspace.data()));
  }
}

// The part of `c` that columns [first, last) make.
Gemm part_of(const Operand& a, const float* strips, bool paired, const Target& c, int64_t first) {
  const int64_t bytes = c.dtype == DType::kFloat32 ? 4 : 2;
  return {a.view,
          a.transposed,
          strips,
          paired,
          a.columns,
          c.alpha,
          c.beta,
          c.bias == nullptr ? nullptr : static_cast<const char*>(c.bias) + first * bytes,
          static_cast<char*>(c.data) + first * bytes,
          c.dtype,
          c.row_stride};
}

}  // namespace

bool gemm_preferred(DType dtype) { return kernels().gemm_preferred[static_cast<int>(dtype)]; }

void multiply_dense(const Operand& a, const Operand& b, const Target& c) {
  const bool paired =
      kernels().gemm_pairs && a.view.dtype == DType::kBFloat16 && b.view.dtype == DType::kBFloat16;
  const int64_t units = paired ? ceil_div(a.columns, 2) : a.columns;
  for_column_chunks(units, b.columns, [&](int64_t first, int64_t last, float* strips) {
    pack(b, paired, first, last, strips);
    run(part_of(a, strips, paired, c, first), a.rows, last - first);
  });
}

void multiply_by_transposed_weight(const Operand& a, const Quantized& weight, int64_t out_features,
                                   const Target& c) {
  const Kernels& with = kernels();
  const int64_t depth = a.columns;
  for_column_chunks(depth, out_features, [&](int64_t first, int64_t last, float* strips) {
    // A few rows of the weight at a time: what is decoded stays in cache until it is packed.
    const int64_t units = ceil_div(last - first, kGemmColumnUnit);
    run_range(units, 1, [&](int64_t begin, int64_t end) {
      auto* decoded = thread_memory<char>(kGemmColumnUnit * depth * int64_t(sizeof(float)));
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t column = first + unit * kGemmColumnUnit;
        const int64_t columns = std::min(column + kGemmColumnUnit, last) - column;
        with.dequantize_4bit(weight, column * depth, (column + columns) * depth, a.view.dtype,
                             decoded);
        with.gemm_pack_columns({decoded, a.view.dtype, depth}, false, columns, depth,
                               strips + (column - first) * depth);
      }
    });
    run(part_of(a, strips, false, c, first), a.rows, last - first);
  });
}

void multiply_by_weight(const Operand& a, const Quantized& weight, int64_t in_features,
                        const Target& c) {
  const Kernels& with = kernels();
  const int64_t depth = a.columns;
  for_column_chunks(depth, in_features, [&](int64_t first, int64_t last, float* strips) {
    const int64_t width = last - first;
    const int64_t grain = std::max<int64_t>(1, kPackGrain / width);
    run_range(depth, grain, [&](int64_t begin, int64_t end) {
      auto* decoded = thread_memory<char>(width * int64_t(sizeof(float)));
      for (int64_t k = begin; k < end; ++k) {
        with.dequantize_4bit(weight, k * in_features + first, k * in_features + last, a.view.dtype,
                             decoded);
        with.gemm_pack_rows({decoded, a.view.dtype, width}, false, k, 1, depth, width, strips);
      }
    });
    run(part_of(a, strips, false, c, first), a.rows, width);
  });
}

namespace {

// A matrix, or its transpose, with adjacent elements in its rows.
Operand operand_of(const Tensor& t) {
  const bool transposed = t.stride(1) != 1 && t.stride(0) == 1;
  return {{t.const_data_ptr(), *dtype_of(t), transposed ? t.stride(1) : t.stride(0)},
          transposed,
          t.size(0),
          t.size(1)};
}

// Without a copy where rows or columns are adjacent.
Tensor with_adjacent_elements(const Tensor& t) {
  const bool adjacent = t.stride(1) == 1 || t.stride(0) == 1;
  return adjacent ? t : torch::stable::contiguous(t);
}

void matmul_into_(Tensor& c, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                  double alpha, double beta) {
  Problems problems("halfbyte::matmul_into_");
  problems.expect_float(a, "a", /*contiguous=*/false);
  problems.expect_float(b, "b", /*contiguous=*/false);
  problems.expect_float(c, "c", /*contiguous=*/false);
  problems.raise();
  const bool matrices = a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0);
  problems.expect(matrices, "b", "matrices a [M, K] and b [K, N]",
                  text(describe(a), " and ", describe(b)));
  problems.raise();
  const int64_t rows = a.size(0);
  const int64_t columns = b.size(1);
  const bool fits = c.dim() == 2 && c.size(0) == rows && c.size(1) == columns &&
                    (columns <= 1 || c.stride(1) == 1) && (rows <= 1 || c.stride(0) >= columns);
  problems.expect(fits, "c",
                  text("a matrix [", rows, ", ", columns, "] with adjacent elements in its rows"),
                  describe(c));
  if (bias.has_value()) problems.expect_vector(*bias, "bias", c.scalar_type(), columns);
  problems.raise();
  if (c.numel() == 0) return;
  const Tensor left = with_adjacent_elements(a);
  const Tensor right = with_adjacent_elements(b);
  multiply_dense(operand_of(left), operand_of(right),
                 {c.mutable_data_ptr(), *dtype_of(c), c.stride(0), static_cast<float>(alpha),
                  static_cast<float>(beta), bias.has_value() ? bias->const_data_ptr() : nullptr});
}

std::string gemm_dtypes() {
  std::string names;
  const char* const all[3] = {"float32", "bfloat16", "float16"};
  for (int i = 0; i < 3; ++i) {
    if (!kernels().gemm_preferred[i]) continue;
    if (!names.empty()) names += ',';
    names += all[i];
  }
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(halfbyte, m) { m.def("gemm_dtypes() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CompositeExplicitAutograd, m) {
  m.impl("gemm_dtypes", TORCH_BOX(&gemm_dtypes));
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) { m.impl("matmul_into_", TORCH_BOX(&matmul_into_)); }

}  // namespace halfbyte
