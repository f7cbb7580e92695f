// The operators of halfbyte/formats/ops.py for the CPU: check, cut into ranges, call the kernels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>

#include "dispatch.h"
#include "quantized_arguments.h"

namespace halfbyte {
namespace {

// Elements a thread should get at least: about 10 microseconds of work.
constexpr int64_t kGrain = 1 << 15;

int64_t grain_of(int64_t elements_each) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_each));
}

Ranks ranks_of(const float* table) {
  std::array<uint32_t, 16> order;
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(),
                   [table](uint32_t a, uint32_t b) { return table[a] < table[b]; });
  Ranks ranks;
  std::copy(order.begin(), order.end(), ranks.codes);
  for (int i = 0; i < 15; ++i) ranks.midpoints[i] = (table[order[i]] + table[order[i + 1]]) / 2;
  ranks.midpoints[15] = std::numeric_limits<float>::infinity();
  return ranks;
}

std::unique_ptr<Ranks8> ranks8_of(const float* table) {
  auto ranks = std::make_unique<Ranks8>();
  for (int i = 0; i < 255; ++i) {
    ranks->midpoints[i] = (double(table[i]) + double(table[i + 1])) / 2;
  }
  ranks->midpoints[255] = std::numeric_limits<double>::infinity();
  // The lower edge of each bin, widened by far more than the error of x * (1 / absmax).
  constexpr double kSlack = 0x1p-20;
  constexpr int kBins = Ranks8::kBins;
  int rank = 0;
  const auto advance = [&](double edge) {
    while (rank < 255 && ranks->midpoints[rank] < edge) ++rank;
    return uint8_t(rank);
  };
  const auto edge_of = [](int bin) {
    return double(bits_to_float((Ranks8::kFirst + uint32_t(bin)) << 17));
  };
  for (int bin = kBins - 1; bin >= 0; --bin) {
    const double edge = bin == kBins - 1 ? 1.0 : edge_of(bin + 1);
    ranks->guess[kBins - 1 - bin] = advance(-edge * (1 + kSlack));
  }
  for (int bin = 0; bin < kBins; ++bin) {
    ranks->guess[kBins + bin] = advance(bin == 0 ? 0.0 : edge_of(bin) * (1 - kSlack));
  }
  return ranks;
}

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& x, const Tensor& table, int64_t block_size) {
  Problems problems("halfbyte::quantize_4bit");
  problems.expect_float(x, "x", /*contiguous=*/false);
  problems.expect_table(table, "table", 16);
  problems.expect_block_size(block_size);
  problems.raise();

  const int64_t numel = x.numel();
  const int64_t num_blocks = ceil_div(numel, block_size);
  const Tensor dense = torch::stable::contiguous(x);
  const Tensor codes = torch::stable::new_empty(dense, {ceil_div(numel, 2)}, ScalarType::Byte);
  const Tensor scales = torch::stable::new_empty(dense, {num_blocks}, ScalarType::Float);
  const Ranks ranks = ranks_of(static_cast<const float*>(table.const_data_ptr()));
  const Kernels& with = kernels();
  const DType dtype = *dtype_of(x);
  const void* source = dense.const_data_ptr();
  auto* codes_out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* scales_out = static_cast<float*>(scales.mutable_data_ptr());
  torch::stable::parallel_for(0, num_blocks, grain_of(block_size), [&](int64_t b, int64_t e) {
    with.quantize_4bit(source, dtype, numel, block_size, ranks, b, e, codes_out, scales_out);
  });
  return {codes, scales};
}

void dequantize_4bit(const Tensor& codes, const Tensor& table, const Tensor& scales,
                     const std::optional<Tensor>& nested_table,
                     const std::optional<Tensor>& nested_scales, double nested_offset,
                     int64_t nested_block_size, int64_t block_size, Tensor& out) {
  Problems problems("halfbyte::dequantize_4bit");
  problems.expect_float(out, "out", /*contiguous=*/true);
  const QuantizedArguments arguments{
      codes,     table, scales, nested_table, nested_scales, nested_offset, nested_block_size,
      block_size};
  const Quantized weight = arguments.view(out.numel(), problems);
  const Kernels& with = kernels();
  const DType dtype = *dtype_of(out);
  const auto element = static_cast<int64_t>(out.element_size());
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  // Cut at whole blocks: two threads never write to one byte range, and no block is decoded twice.
  const int64_t num_blocks = ceil_div(weight.numel, block_size);
  torch::stable::parallel_for(0, num_blocks, grain_of(block_size), [&](int64_t b, int64_t e) {
    const int64_t begin = b * block_size;
    const int64_t end = std::min(e * block_size, weight.numel);
    with.dequantize_4bit(weight, begin, end, dtype, target + begin * element);
  });
}

std::tuple<Tensor, Tensor> quantize_8bit(const Tensor& x, const Tensor& table, int64_t block_size) {
  Problems problems("halfbyte::quantize_8bit");
  problems.expect_float(x, "x", /*contiguous=*/false);
  problems.expect_table(table, "table", 256);
  problems.expect_positive(block_size, "block_size");
  problems.raise();
  const auto* values = static_cast<const float*>(table.const_data_ptr());
  problems.expect(std::is_sorted(values, values + 256), "table", "ascending values", "others");
  problems.raise();

  const int64_t numel = x.numel();
  const int64_t num_blocks = ceil_div(numel, block_size);
  const Tensor dense = torch::stable::contiguous(x);
  const Tensor codes = torch::stable::new_empty(dense, {numel}, ScalarType::Byte);
  const Tensor scales = torch::stable::new_empty(dense, {num_blocks}, ScalarType::Float);
  const auto ranks = ranks8_of(values);
  const Kernels& with = kernels();
  const DType dtype = *dtype_of(x);
  const void* source = dense.const_data_ptr();
  auto* codes_out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* scales_out = static_cast<float*>(scales.mutable_data_ptr());
  // One block cannot be longer than the tensor; this keeps block * block_size from overflowing.
  const int64_t length = std::min(block_size, std::max<int64_t>(1, numel));
  torch::stable::parallel_for(0, num_blocks, grain_of(length), [&](int64_t b, int64_t e) {
    with.quantize_8bit(source, dtype, numel, length, *ranks, b, e, codes_out, scales_out);
  });
  return {codes, scales};
}

void dequantize_8bit(const Tensor& codes, const Tensor& table, const Tensor& scales,
                     int64_t block_size, Tensor& out) {
  Problems problems("halfbyte::dequantize_8bit");
  const int64_t numel = out.numel();
  problems.expect_float(out, "out", /*contiguous=*/true);
  problems.expect_table(table, "table", 256);
  problems.expect_vector(codes, "codes", ScalarType::Byte, numel);
  problems.expect_positive(block_size, "block_size");
  problems.raise();
  problems.expect_vector(scales, "scales", ScalarType::Float, ceil_div(numel, block_size));
  problems.raise();
  const Kernels& with = kernels();
  const DType dtype = *dtype_of(out);
  const auto* source = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* values = static_cast<const float*>(table.const_data_ptr());
  const auto* scales_in = static_cast<const float*>(scales.const_data_ptr());
  void* target = out.mutable_data_ptr();
  const int64_t length = std::min(block_size, std::max<int64_t>(1, numel));
  torch::stable::parallel_for(0, numel, kGrain, [&](int64_t b, int64_t e) {
    with.dequantize_8bit(source, values, scales_in, length, b, e, dtype, target);
  });
}

std::string cpu_isa() { return kernels().name; }
std::string cpu_isas() { return available_kernels(); }
void use_cpu_isa(std::string name) { use_kernels(name); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(halfbyte, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  m.def("use_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("use_cpu_isa", TORCH_BOX(&use_cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) {
  m.impl("quantize_4bit", TORCH_BOX(&quantize_4bit));
  m.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit));
  m.impl("quantize_8bit", TORCH_BOX(&quantize_8bit));
  m.impl("dequantize_8bit", TORCH_BOX(&dequantize_8bit));
}

}  // namespace halfbyte
