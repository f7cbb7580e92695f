// The kernels of one instruction set, as a table of functions over ranges.
//
// The operators cut the work into ranges and call these from PyTorch's threads. Ranges of blocks
// and rows are independent: how work is cut never changes a result.

#pragma once

#include "attention_types.h"
#include "decode_types.h"
#include "elementwise_types.h"
#include "gemm_types.h"
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

  // The two halves of an AdamW step on `count` elements; PyTorch takes the square root between
  // them, in place: `moments` leaves the second moment in `root` too, `apply` finds its root there.
  void (*adamw_moments)(const AdamWScalars& scalars, const float* grad, float* exp_avg,
                        float* exp_avg_sq, float* root, int64_t count);
  void (*adamw_apply)(const AdamWScalars& scalars, const float* exp_avg, const float* root,
                      float* param, int64_t count);

  // Causal attention for what a task owns, with scratch memory of the thread: attention_types.h.
  // `attention_delta` is for tokens [begin, end).
  void (*attention_forward)(const Attention& attention, const AttentionTask& task, float* scratch);
  void (*attention_delta)(const Attention& attention, int64_t begin, int64_t end);
  void (*attention_backward)(const Attention& attention, const AttentionTask& task, float* scratch);

  // Rows or tokens [begin, end): elementwise_types.h.
  void (*rms_norm)(const NormRows& rows, int64_t begin, int64_t end);
  void (*rms_norm_backward)(const NormRows& rows, int64_t begin, int64_t end, float* grad_weight);
  void (*rotate)(const Rotation& turn, int64_t begin, int64_t end);
  void (*gated)(const GatedRows& rows, int64_t begin, int64_t end);
  void (*gated_backward)(const GatedRows& rows, int64_t begin, int64_t end);

  // x W^T for few rows, in two steps. `prepare` rewrites rows [begin, end) of x [rows,
  // in_features] in the order that `linear` reads; `linear` writes outputs [begin, end) of every
  // row of y [rows, out_features], from the prepared x and an optional bias [out_features]. All
  // of one dtype; products are summed in float32.
  int64_t (*prepared_bytes)(const Quantized& weight, const LinearShape& shape, DType dtype);
  void (*prepare)(const Quantized& weight, const LinearShape& shape, DType dtype, const void* x,
                  int64_t begin, int64_t end, void* prepared);
  void (*linear)(const Quantized& weight, const LinearShape& shape, DType dtype,
                 const void* prepared, int64_t begin, int64_t end, const void* bias, void* y);

  // For a step of decoding: outputs [begin, end) of few rows times a dense weight, and the query
  // heads of one key-value head over all keys: decode_types.h.
  void (*dense_rows)(const DenseRows& product, int64_t begin, int64_t end);
  void (*single_query)(const SingleQuery& attention, int64_t group, float* scratch);

  // Rows [begin, end) of logits [., classes]: their losses, and gradients in place of the logits.
  void (*cross_entropy)(float* logits, const int64_t* targets, int64_t begin, int64_t end,
                        int64_t classes, float grad_scale, float* losses);

  // Products of matrices of any float dtype: gemm.h. `gemm_preferred` says for which dtypes,
  // float32, bfloat16 and float16, they are faster than PyTorch's: measured, see docs/kernels.md.
  // `gemm_pairs` says whether products of two bfloat16 matrices can be `paired`.
  void (*gemm_pack_rows)(const View& b, bool paired, int64_t first, int64_t rows, int64_t depth,
                         int64_t columns, float* strips);
  void (*gemm_pack_columns)(const View& bt, bool paired, int64_t columns, int64_t depth,
                            float* strips);
  void (*gemm_block)(const Gemm& gemm, const GemmBlock& block, float* scratch);
  bool gemm_preferred[3];
  bool gemm_pairs;

  // The most rows for which `linear` is faster than filling a workspace for PyTorch's matmul,
  // for float32, bfloat16 and float16: measured, see docs/kernels.md.
  int64_t few_rows[3];
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Bf16;
#endif

}  // namespace halfbyte
