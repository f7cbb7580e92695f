// Few rows times a dense weight, and one query over a cache of keys: what a decoding step needs
// beside 4-bit products. Included once in the namespace of each instruction set.
//
// Every sum has an order that depends on its length alone.

#pragma once

#include "decode_types.h"
#include "lanes.h"
#include "plain.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Outputs [begin, end) of kRows rows: each weight is loaded once for all of them.
template <DType dtype, int kRows>
void dense_row_group(const DenseRows& product, int64_t row, int64_t begin, int64_t end) {
  using Out = Element<dtype>;
  constexpr int kSums = kRows == 1 ? 4 : 2;  // so that products wait less for each other
  const int64_t depth = product.in_features;
  const float* x = product.x + row * depth;
  const auto* biases = static_cast<const typename Out::Type*>(product.bias);
  auto* y = static_cast<typename Out::Type*>(product.y) + row * product.out_features;
  for (int64_t n = begin; n < end; ++n) {
    const auto* w =
        static_cast<const typename Out::Type*>(product.weight) + n * product.weight_stride;
    Floats sums[kRows][kSums] = {};
    int64_t k = 0;
    for (; k + kSums * kLanes <= depth; k += kSums * kLanes) {
      for (int i = 0; i < kSums; ++i) {
        const Floats column = load<dtype>(w + k + i * kLanes);
        for (int m = 0; m < kRows; ++m) {
          sums[m][i] = multiply_add(column, load(x + m * depth + k + i * kLanes), sums[m][i]);
        }
      }
    }
    float rest[kRows] = {};
    for (; k < depth; ++k) {
      const float column = Out::load(w[k]);
      for (int m = 0; m < kRows; ++m) rest[m] += column * x[m * depth + k];
    }
    const float offset = biases == nullptr ? 0.0f : Out::load(biases[n]);
    for (int m = 0; m < kRows; ++m) {
      Floats total = sums[m][0] + sums[m][1];
      if constexpr (kSums == 4) total = total + (sums[m][2] + sums[m][3]);
      y[m * product.out_features + n] = Out::store(sum_of(total) + rest[m] + offset);
    }
  }
}

void dense_rows(const DenseRows& product, int64_t begin, int64_t end) {
  with_dtype(product.dtype, [&]<DType d>() {
    int64_t row = 0;
    for (; row + 4 <= product.rows; row += 4) dense_row_group<d, 4>(product, row, begin, end);
    switch (product.rows - row) {
      case 3:
        return dense_row_group<d, 3>(product, row, begin, end);
      case 2:
        return dense_row_group<d, 2>(product, row, begin, end);
      case 1:
        return dense_row_group<d, 1>(product, row, begin, end);
      default:
        return;
    }
  });
}

float dot(const float* a, const float* b, int64_t count) {
  Floats sum{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum = multiply_add(load(a + i), load(b + i), sum);
  float rest = 0.0f;
  for (; i < count; ++i) rest += a[i] * b[i];
  return sum_of(sum) + rest;
}

// y += factor * x
void add_scaled(float* y, const float* x, float factor, int64_t count) {
  const Floats factors = broadcast(factor);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, multiply_add(factors, load(x + i), load(y + i)));
  }
  for (; i < count; ++i) y[i] += factor * x[i];
}

// exp(x - largest) in place of `count` scores, a multiple of kLanes; returns their sum.
float exponentials(float* scores, int64_t count) {
  constexpr float kLog2E = 0x1.715476p+0f;
  Floats top = load(scores);
  for (int64_t i = kLanes; i < count; i += kLanes) top = larger(load(scores + i), top);
  const Floats largest = broadcast(largest_of(top));
  Floats sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats e = exp2((load(scores + i) - largest) * broadcast(kLog2E));
    store(scores + i, e);
    sum = sum + e;
  }
  return sum_of(sum);
}

template <DType dtype>
void single_query_group(const SingleQuery& a, int64_t group, float* scratch) {
  using T = typename Element<dtype>::Type;
  const int64_t heads = a.heads_each(), dim = a.head_dim, keys = a.num_keys;
  const int64_t padded = a.padded_keys();
  float* scores = scratch;  // [heads, padded]
  float* queries = scores + heads * padded;
  float* sums = queries + heads * dim;
  float* row = sums + heads * dim;
  load_floats<dtype>(a.q, group * heads * dim, heads * dim, queries);
  const T* k = static_cast<const T*>(a.k) + group * a.k_group_stride;
  for (int64_t j = 0; j < keys; ++j) {
    load_floats<dtype>(k + j * a.k_stride, 0, dim, row);
    for (int64_t h = 0; h < heads; ++h) {
      float score = a.scale * dot(queries + h * dim, row, dim);
      if (a.softcap != 0.0f) score = a.softcap * __builtin_tanhf(score / a.softcap);
      scores[h * padded + j] = score;
    }
  }
  float* totals = row + dim;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t j = keys; j < padded; ++j) scores[h * padded + j] = -__builtin_inff();
    totals[h] = exponentials(scores + h * padded, padded);
  }
  for (int64_t i = 0; i < heads * dim; ++i) sums[i] = 0.0f;
  const T* v = static_cast<const T*>(a.v) + group * a.v_group_stride;
  for (int64_t j = 0; j < keys; ++j) {
    load_floats<dtype>(v + j * a.v_stride, 0, dim, row);
    for (int64_t h = 0; h < heads; ++h) {
      add_scaled(sums + h * dim, row, scores[h * padded + j], dim);
    }
  }
  T* out = static_cast<T*>(a.out) + group * heads * dim;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < dim; ++i) {
      out[h * dim + i] = Element<dtype>::store(sums[h * dim + i] / totals[h]);
    }
  }
}

void single_query(const SingleQuery& attention, int64_t group, float* scratch) {
  with_dtype(attention.dtype, [&]<DType d>() { single_query_group<d>(attention, group, scratch); });
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
