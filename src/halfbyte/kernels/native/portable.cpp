// For any machine: nothing but plain loops.

#define HALFBYTE_ISA portable
#define HALFBYTE_LANES 4

#include <utility>

#include "adamw.h"
#include "attention.h"
#include "decode.h"
#include "elementwise.h"
#include "gemm.h"
#include "matmul.h"
#include "softmax.h"

namespace halfbyte::portable {
namespace {

template <DType dtype>
struct Micro {
  // Vector extensions of GCC and Clang: 128 bits are SSE on x86-64 and NEON on aarch64.
  typedef float Vector __attribute__((vector_size(16)));
  using Sum = Vector;
  using Element = float;
  static constexpr int kRows = 2, kColumns = 4, kStep = 4, kPad = 4;
  static constexpr int64_t kDepth = 1024, kPanel = 16;

  static Sum zero() { return Sum{}; }
  static Vector load(const float* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static Sum multiply_add(Sum sum, Vector a, Vector b) { return sum + a * b; }
  static void reduce(const Sum* sums, float* out) {
    for (int i = 0; i < kColumns; ++i) {
      out[i] = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
    }
  }

  struct Decoder {
    explicit Decoder(const Quantized& w, int64_t) : weight(w) {}
    int64_t decode(int64_t begin, int64_t end, float* out) const {
      for_each_block(weight, begin, end, [&](float scale, int64_t from, int64_t to) {
        float values[16];
        rounded_table<dtype>(weight.table, scale, values);
        look_up(weight.codes, values, from, to, out + (from - begin));
      });
      return end - begin;
    }
    const Quantized& weight;
  };
};

using Linear = FloatLinear<Micro>;

}  // namespace
}  // namespace halfbyte::portable

namespace halfbyte {

const Kernels kPortable = {
    .name = "portable",
    .quantize_4bit = portable::quantize_4bit,
    .dequantize_4bit = portable::dequantize_4bit,
    .quantize_8bit = portable::quantize_8bit,
    .dequantize_8bit = portable::dequantize_8bit,
    .adamw_moments = portable::adamw_moments,
    .adamw_apply = portable::adamw_apply,
    .attention_forward = portable::attention_forward,
    .attention_delta = portable::attention_delta,
    .attention_backward = portable::attention_backward,
    .rms_norm = portable::rms_norm,
    .rms_norm_backward = portable::rms_norm_backward,
    .rotate = portable::rotate,
    .gated = portable::gated,
    .gated_backward = portable::gated_backward,
    .prepared_bytes = portable::Linear::prepared_bytes,
    .prepare = portable::Linear::prepare,
    .linear = portable::Linear::run,
    .dense_rows = portable::dense_rows,
    .single_query = portable::single_query,
    .cross_entropy = portable::cross_entropy,
    .gemm_pack_rows = portable::gemm_pack_rows,
    .gemm_pack_columns = portable::gemm_pack_columns,
    .gemm_block = portable::gemm_block,
    .gemm_preferred = {false, true, true},
    .gemm_pairs = false,
    .few_rows = {16, 64, INT64_MAX},
};

}  // namespace halfbyte
