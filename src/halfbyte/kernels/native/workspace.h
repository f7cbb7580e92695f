// Memory for a decoded weight or the blocks of an attention, reused from call to call.
//
// A fresh buffer would cost a page fault per 4 KiB, four times the price of decoding into it. As
// many buffers exist as calls run at the same time; they are kept until `release_workspace`.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace halfbyte {

// A buffer of at least `bytes`, taken from the pool for the life of this object.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

  // The buffer's beginning as a matrix of the dtype of `like`.
  torch::stable::Tensor view(int64_t rows, int64_t columns,
                             const torch::stable::Tensor& like) const;

 private:
  void take(int64_t bytes);

  void* data_;
  int64_t bytes_;
};

// The most bytes a call asks for, except that a single row or column is never cut. Default 128 MiB.
int64_t workspace_limit();
void set_workspace_limit(int64_t bytes);

// Bytes that are held, in use or not; and giving back those not in use.
int64_t workspace_bytes();
void release_workspace();

}  // namespace halfbyte
