// Results of operators in memory that earlier ones have left.
//
// A training step makes and drops several gigabytes of activations. From the system each block is
// fresh: a page fault and 4 KiB of zeros at a time, a tenth to a sixth of the step. While reuse is
// on, blocks that tensors leave are kept and cut up or put together for the next ones, whatever
// their size. What is kept and what is in use together never exceed the most that was in use at
// once, and leave room for what else arrives as activations go; so a peak stays what it is. A block
// is never larger than its tensor, but for the rest of a page.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace halfbyte {

// An uninitialized dense tensor on the device of `like`, of its dtype unless another is given.
torch::stable::Tensor activation(const torch::stable::Tensor& like, std::vector<int64_t> shape,
                                 std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

// One of the shape and dtype of `like`.
torch::stable::Tensor activation_like(const torch::stable::Tensor& like);

}  // namespace halfbyte
