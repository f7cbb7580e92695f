// The arguments that stand for a 4-bit tensor, in the order of the operators' schemas.

#pragma once

#include <algorithm>

#include "checks.h"

namespace halfbyte {

struct QuantizedArguments {
  const Tensor& codes;
  const Tensor& table;
  const Tensor& scales;
  const std::optional<Tensor>& nested_table;
  const std::optional<Tensor>& nested_scales;
  double nested_offset;
  int64_t nested_block_size;
  int64_t block_size;

  // A view for the kernels of `numel` elements; valid while the tensors live. Throws all
  // problems, those found by the caller included.
  Quantized view(int64_t numel, Problems& problems) const {
    problems.expect_block_size(block_size);
    problems.expect_table(table, "table", 16);
    problems.expect_vector(codes, "codes", ScalarType::Byte, ceil_div(numel, 2));
    const bool nested = nested_table.has_value() && nested_scales.has_value();
    problems.expect(nested_table.has_value() == nested_scales.has_value(), "nested_table",
                    "both or neither of nested_table and nested_scales", "one of them");
    if (nested) problems.expect_positive(nested_block_size, "nested_block_size");
    problems.raise();  // the sizes below divide by the block sizes

    const int64_t num_scales = ceil_div(numel, block_size);
    problems.expect_vector(scales, "scales", nested ? ScalarType::Byte : ScalarType::Float,
                           num_scales);
    Quantized result{};
    if (nested) {
      problems.expect_table(*nested_table, "nested_table", 256);
      problems.expect_vector(*nested_scales, "nested_scales", ScalarType::Float,
                             ceil_div(num_scales, nested_block_size));
      problems.raise();
      result.scales.codes = static_cast<const uint8_t*>(scales.const_data_ptr());
      result.scales.nested_table = static_cast<const float*>(nested_table->const_data_ptr());
      result.scales.nested_scales = static_cast<const float*>(nested_scales->const_data_ptr());
      result.scales.offset = static_cast<float>(nested_offset);
      // One second-level block is all there can be; larger numbers would overflow in kernels.
      result.scales.nested_block_size =
          std::min(nested_block_size, std::max<int64_t>(1, num_scales));
    } else {
      problems.raise();
      result.scales.plain = static_cast<const float*>(scales.const_data_ptr());
    }
    result.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
    result.table = static_cast<const float*>(table.const_data_ptr());
    result.block_size = block_size;
    result.numel = numel;
    return result;
  }
};

}  // namespace halfbyte
