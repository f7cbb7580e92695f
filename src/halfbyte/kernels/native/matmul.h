// y = x W^T for few rows of x: weights are decoded a panel at a time into cache, never to memory.
//
// A tile of MR x NR outputs stays in registers while both operands stream along the input
// features. The order of summation of an output depends on the number of input features alone:
// neither the tile it falls into nor the number of threads changes its bits.
//
// `Micro` is one instruction set and dtype:
//   Element, Vector            what panels hold; a register of kStep of them
//   Sum                        accumulator; zero(), multiply_add(Sum, Vector, Vector)
//   load, reduce               a register from memory; NR accumulators to NR floats
//   kRows (MR), kColumns (NR)  the tile; kDepth input features and kPanel outputs a panel
//   kPad                       both operands are filled with zeros to a multiple of it
//   Decoder                    Decoder(weight, in_features).decode(begin, end, Element* out)
//                              returns how many elements it wrote, zeros included

#pragma once

#include <cstdlib>
#include <memory>

#include "kernels.h"
#include "plain.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Memory of one thread, kept for its next call, aligned to a cache line.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const auto bytes = round_up(count * int64_t(sizeof(T)), 64);
    if (bytes > size_) {
      memory_.reset();  // before the new allocation, not after
      memory_.reset(std::aligned_alloc(64, size_t(bytes)));
      size_ = memory_ ? bytes : 0;
      if (!memory_) std::abort();  // a few hundred kilobytes: the process is lost anyway
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  std::unique_ptr<void, FreeDeleter> memory_;
  int64_t size_ = 0;
};

// A tile over `depth` input features, added to `out` [MR][kPanel] unless it is the first.
template <typename Micro, int kTileRows>
void tile(const typename Micro::Element* x, int64_t x_stride, const typename Micro::Element* w,
          int64_t depth, bool first, float* out) {
  typename Micro::Sum sums[kTileRows][Micro::kColumns];
  for (auto& row : sums) {
    for (auto& sum : row) sum = Micro::zero();
  }
  for (int64_t k = 0; k < depth; k += Micro::kStep) {
    typename Micro::Vector rows[kTileRows];
    for (int m = 0; m < kTileRows; ++m) rows[m] = Micro::load(x + m * x_stride + k);
    for (int n = 0; n < Micro::kColumns; ++n) {
      const typename Micro::Vector column = Micro::load(w + n * Micro::kDepth + k);
      for (int m = 0; m < kTileRows; ++m) {
        sums[m][n] = Micro::multiply_add(sums[m][n], rows[m], column);
      }
    }
  }
  for (int m = 0; m < kTileRows; ++m) {
    float totals[Micro::kColumns];
    Micro::reduce(sums[m], totals);
    float* target = out + m * Micro::kPanel;
    for (int n = 0; n < Micro::kColumns; ++n) {
      target[n] = first ? totals[n] : target[n] + totals[n];
    }
  }
}

template <typename Micro, int kTileRows>
void tile_of(int64_t rows, const typename Micro::Element* x, int64_t x_stride,
             const typename Micro::Element* w, int64_t depth, bool first, float* out) {
  if constexpr (kTileRows > 1) {
    if (rows < kTileRows) {
      return tile_of<Micro, kTileRows - 1>(rows, x, x_stride, w, depth, first, out);
    }
  }
  tile<Micro, kTileRows>(x, x_stride, w, depth, first, out);
}

// Outputs [begin, end) of every row. `x` is prepared: dense rows of `x_stride` elements, a
// multiple of kPad, zero beyond the input features.
template <typename Micro, DType dtype>
void multiply(const Quantized& weight, const LinearShape& shape, const typename Micro::Element* x,
              int64_t x_stride, int64_t begin, int64_t end, const void* bias, void* y) {
  using Out = Element<dtype>;
  using Type = typename Micro::Element;
  static thread_local Scratch panel_memory;
  static thread_local Scratch sum_memory;
  const typename Micro::Decoder decoder(weight, shape.in_features);
  Type* panel = panel_memory.get<Type>(Micro::kPanel * Micro::kDepth);
  float* sums = sum_memory.get<float>(shape.rows * Micro::kPanel);
  const auto* biases = static_cast<const typename Out::Type*>(bias);
  auto* target = static_cast<typename Out::Type*>(y);

  for (int64_t n = begin; n < end; n += Micro::kPanel) {
    const int64_t columns = smaller(Micro::kPanel, end - n);
    const int64_t padded_columns = round_up(columns, Micro::kColumns);
    for (int64_t k = 0; k < shape.in_features; k += Micro::kDepth) {
      const int64_t depth = smaller(Micro::kDepth, shape.in_features - k);
      const int64_t padded = round_up(depth, Micro::kPad);
      for (int64_t j = 0; j < padded_columns; ++j) {
        Type* row = panel + j * Micro::kDepth;
        int64_t filled = 0;
        if (j < columns) {
          const int64_t first = (n + j) * shape.in_features + k;
          filled = decoder.decode(first, first + depth, row);
        }
        for (; filled < padded; ++filled) row[filled] = Type{};
      }
      for (int64_t m = 0; m < shape.rows; m += Micro::kRows) {
        for (int64_t j = 0; j < padded_columns; j += Micro::kColumns) {
          tile_of<Micro, Micro::kRows>(shape.rows - m, x + m * x_stride + k, x_stride,
                                       panel + j * Micro::kDepth, padded, k == 0,
                                       sums + m * Micro::kPanel + j);
        }
      }
    }
    for (int64_t m = 0; m < shape.rows; ++m) {
      typename Out::Type* row = target + m * shape.out_features + n;
      for (int64_t j = 0; j < columns; ++j) {
        const float offset = biases == nullptr ? 0.0f : Out::load(biases[n + j]);
        row[j] = Out::store(sums[m * Micro::kPanel + j] + offset);
      }
    }
  }
}

// Rows [begin, end) of x as floats, zero-padded to `stride`.
template <DType dtype>
void widen_rows(const void* x, int64_t in_features, int64_t begin, int64_t end, int64_t stride,
                float* out) {
  for (int64_t row = begin; row < end; ++row) {
    float* target = out + row * stride;
    load_floats<dtype>(x, row * in_features, in_features, target);
    for (int64_t i = in_features; i < stride; ++i) target[i] = 0.0f;
  }
}

// The values of a block as floats that were rounded to `dtype`: what dequantizing would give.
template <DType dtype>
void rounded_table(const float* table, float scale, float* values) {
  for (int i = 0; i < 16; ++i)
    values[i] = Element<dtype>::load(Element<dtype>::store(table[i] * scale));
}

// The whole operation in float arithmetic, for a `Micro` template over dtypes.
template <template <DType> typename FloatMicro>
struct FloatLinear {
  static int64_t stride(int64_t in_features) {
    return round_up(in_features, FloatMicro<DType::kFloat32>::kStep);
  }
  static int64_t prepared_bytes(const Quantized&, const LinearShape& shape, DType) {
    return shape.rows * stride(shape.in_features) * int64_t(sizeof(float));
  }
  static void prepare(const Quantized&, const LinearShape& shape, DType dtype, const void* x,
                      int64_t begin, int64_t end, void* out) {
    with_dtype(dtype, [&]<DType d>() {
      widen_rows<d>(x, shape.in_features, begin, end, stride(shape.in_features),
                    static_cast<float*>(out));
    });
  }
  static void run(const Quantized& weight, const LinearShape& shape, DType dtype, const void* x,
                  int64_t begin, int64_t end, const void* bias, void* y) {
    with_dtype(dtype, [&]<DType d>() {
      multiply<FloatMicro<d>, d>(weight, shape, static_cast<const float*>(x),
                                 stride(shape.in_features), begin, end, bias, y);
    });
  }
};

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
