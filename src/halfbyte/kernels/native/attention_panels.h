// Rows of queries, keys and values between the tensors of a call and float panels.

#pragma once

#include "attention_tiles.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Heads [head, head + heads) of tokens [token, token + tokens), a row each.
struct Piece {
  int64_t token, tokens, head, heads;
};

// The rows of a piece as floats, times a factor; zeros up to a whole number of registers.
template <DType d>
void load_rows_of(const Heads& source, const Piece& piece, int64_t features, float factor,
                  float* out, int64_t stride) {
  // Rows of other heads lie between ours, which is more than the processor foresees.
  constexpr int64_t kTokensAhead = 4;
  constexpr int64_t kLine = 64 / int64_t(sizeof(typename Element<d>::Type));
  const int64_t padded = pad_to_lanes(features);
  const auto* data = static_cast<const typename Element<d>::Type*>(source.data) +
                     piece.token * source.token_stride + piece.head * source.head_stride;
  for (int64_t t = 0; t < piece.tokens; ++t) {
    const int64_t later = smaller(t + kTokensAhead, piece.tokens - 1);
    for (int64_t h = 0; h < piece.heads; ++h, out += stride) {
      const auto* row = data + t * source.token_stride + h * source.head_stride;
      const auto* next = data + later * source.token_stride + h * source.head_stride;
      for (int64_t i = 0; i < features; i += kLine) __builtin_prefetch(next + i);
      int64_t i = 0;
      for (; i + kLanes <= features; i += kLanes) {
        store(out + i, load<d>(row + i) * broadcast(factor));
      }
      for (; i < features; ++i) out[i] = Element<d>::load(row[i]) * factor;
      for (; i < padded; ++i) out[i] = 0.0f;
    }
  }
}

void load_float_rows(DType dtype, const Heads& source, const Piece& piece, int64_t features,
                     float factor, float* out, int64_t stride) {
  with_dtype(dtype,
             [&]<DType d>() { load_rows_of<d>(source, piece, features, factor, out, stride); });
}

// The other way; each row has a factor of its own.
template <DType d, typename Factor>
void store_rows_of(const float* rows, int64_t stride, Factor factor, const Piece& piece,
                   int64_t features, const Heads& target) {
  auto* data = static_cast<typename Element<d>::Type*>(target.data) +
               piece.token * target.token_stride + piece.head * target.head_stride;
  for (int64_t t = 0; t < piece.tokens; ++t) {
    for (int64_t h = 0; h < piece.heads; ++h, rows += stride) {
      auto* out = data + t * target.token_stride + h * target.head_stride;
      const float scale = factor(t * piece.heads + h);
      int64_t i = 0;
      for (; i + kLanes <= features; i += kLanes) {
        store<d>(out + i, load(rows + i) * broadcast(scale));
      }
      for (; i < features; ++i) out[i] = Element<d>::store(rows[i] * scale);
    }
  }
}

template <typename Factor>
void store_rows(DType dtype, const float* rows, int64_t stride, Factor factor, const Piece& piece,
                int64_t features, const Heads& target) {
  with_dtype(dtype,
             [&]<DType d>() { store_rows_of<d>(rows, stride, factor, piece, features, target); });
}

// out[feature][key] from rows[key][feature]; zeros up to a whole number of registers of keys.
void transpose(const float* rows, int64_t stride, int64_t keys, int64_t features, float* out) {
  const int64_t padded = pad_to_lanes(keys);
  for (int64_t i = 0; i < features; ++i) {
    float* target = out + i * kKeyStride;
    for (int64_t n = 0; n < keys; ++n) target[n] = rows[n * stride + i];
    for (int64_t n = keys; n < padded; ++n) target[n] = 0.0f;
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
