// The kernels of one instruction set, as a table of functions over ranges.
//
// The operators cut the work into ranges and call these from PyTorch's threads. Ranges of blocks
// and rows are independent: how work is cut never changes a result.

#pragma once

#include "types.h"

namespace halfbyte {

struct Kernels {
  const char* name;

  // Blocks [begin, end) of x [numel]: packed codes and one scale a block. The law is written down
  // in halfbyte/formats/ops.py.
  void (*quantize_4bit)(const void* x, DType dtype, int64_t numel, int64_t block_size,
                        const Ranks& ranks, int64_t begin, int64_t end, uint8_t* codes,
                        float* scales);

  // Elements [begin, end), written to out[0, end - begin).
  void (*dequantize_4bit)(const Quantized& weight, int64_t begin, int64_t end, DType dtype,
                          void* out);

  // Blocks [begin, end) of x [numel].
  void (*quantize_8bit)(const void* x, DType dtype, int64_t numel, int64_t block_size,
                        const Ranks8& ranks, int64_t begin, int64_t end, uint8_t* codes,
                        float* scales);

  // Elements [begin, end), written to out[begin, end).
  void (*dequantize_8bit)(const uint8_t* codes, const float* table, const float* scales,
                          int64_t block_size, int64_t begin, int64_t end, DType dtype, void* out);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Bf16;
#endif

}  // namespace halfbyte
