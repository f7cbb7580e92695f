// What stands between two products of a decoder layer: each row is read once from memory and
// written once. Included once in the namespace of each instruction set.

#pragma once

#include "elementwise_types.h"
#include "lanes.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

template <DType d>
const typename Element<d>::Type* row_of(const void* data, int64_t first) {
  return static_cast<const typename Element<d>::Type*>(data) + first;
}

template <DType d>
typename Element<d>::Type* row_of(void* data, int64_t first) {
  return static_cast<typename Element<d>::Type*>(data) + first;
}

// The first `count` lanes; the others are zero, or stay as they are.
template <DType d>
Floats load_first(const typename Element<d>::Type* p, int64_t count) {
  if (count >= kLanes) return load<d>(p);
  typename Element<d>::Type lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load<d>(lanes);
}

template <DType d>
void store_first(typename Element<d>::Type* p, int64_t count, Floats v) {
  if (count >= kLanes) return store<d>(p, v);
  typename Element<d>::Type lanes[kLanes];
  store<d>(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// As float32 but for the end of a row.
Floats load_first(const float* p, int64_t count) { return load_first<DType::kFloat32>(p, count); }

// Sums over a row in several registers, so that no addition waits for the one before.
struct RowSum {
  static constexpr int kParts = 4;
  Floats parts[kParts] = {};

  float total() const { return sum_of((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

// Calls function(i, count, part) for each register of a row; `count` floats of it are there.
template <typename Function>
inline void for_each_register(int64_t features, Function function) {
  int64_t i = 0;
  for (; i + RowSum::kParts * kLanes <= features; i += RowSum::kParts * kLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < RowSum::kParts; ++part) {
      function(i + part * kLanes, int64_t{kLanes}, part);
    }
  }
  for (int part = 0; i < features; i += kLanes, ++part) {
    function(i, smaller(features - i, kLanes), part);
  }
}

float inverse_root(float sum_of_squares, int64_t features, float eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares / float(features) + eps);
}

template <DType d>
void rms_norm_of(const NormRows rows, int64_t begin, int64_t end) {
  const int64_t features = rows.features;
  for (int64_t r = begin; r < end; ++r) {
    const auto* x = row_of<d>(rows.x, r * features);
    RowSum squares;
    if (rows.update != nullptr) {
      const auto* update = row_of<d>(rows.update, r * features);
      auto* sum = row_of<d>(rows.sum, r * features);
      for_each_register(features, [&](int64_t i, int64_t count, int) {
        store_first<d>(sum + i, count,
                       load_first<d>(x + i, count) + load_first<d>(update + i, count));
      });
      x = sum;
    }
    for_each_register(features, [&](int64_t i, int64_t count, int part) {
      const Floats value = load_first<d>(x + i, count);
      squares.parts[part] = multiply_add(value, value, squares.parts[part]);
    });
    const Floats inverse = broadcast(inverse_root(squares.total(), features, rows.eps));
    auto* out = row_of<d>(rows.out, r * features);
    for_each_register(features, [&](int64_t i, int64_t count, int) {
      const Floats normal = load_first<d>(x + i, count) * inverse;
      store_first<d>(out + i, count, normal * load_first(rows.weight + i, count));
    });
  }
}

void rms_norm(const NormRows& rows, int64_t begin, int64_t end) {
  with_dtype(rows.dtype, [&]<DType d>() { rms_norm_of<d>(rows, begin, end); });
}

// With n = x * inverse and s = grad * weight: grad_x = (s - n * mean(s * n)) * inverse + carry;
// grad * n is added to `grad_weight` [features] if that is wanted.
template <DType d>
void rms_norm_backward_of(const NormRows rows, int64_t begin, int64_t end, float* grad_weight) {
  const int64_t features = rows.features;
  for (int64_t r = begin; r < end; ++r) {
    const auto* x = row_of<d>(rows.x, r * features);
    const auto* grad = row_of<d>(rows.grad, r * features);
    RowSum squares, products;
    for_each_register(features, [&](int64_t i, int64_t count, int part) {
      const Floats value = load_first<d>(x + i, count);
      const Floats scaled = load_first<d>(grad + i, count) * load_first(rows.weight + i, count);
      squares.parts[part] = multiply_add(value, value, squares.parts[part]);
      products.parts[part] = multiply_add(scaled, value, products.parts[part]);
    });
    const float root = inverse_root(squares.total(), features, rows.eps);
    const Floats inverse = broadcast(root);
    const Floats along = broadcast(products.total() * root / float(features));
    auto* grad_x = row_of<d>(rows.grad_x, r * features);
    const auto* carry = rows.carry == nullptr ? nullptr : row_of<d>(rows.carry, r * features);
    for_each_register(features, [&](int64_t i, int64_t count, int) {
      const Floats normal = load_first<d>(x + i, count) * inverse;
      const Floats gradient = load_first<d>(grad + i, count);
      const Floats scaled = gradient * load_first(rows.weight + i, count);
      Floats result = (scaled - normal * along) * inverse;
      if (carry != nullptr) result += load_first<d>(carry + i, count);
      store_first<d>(grad_x + i, count, result);
      if (grad_weight != nullptr) {
        const Floats sum = load_first(grad_weight + i, count) + gradient * normal;
        store_first<DType::kFloat32>(grad_weight + i, count, sum);
      }
    });
  }
}

void rms_norm_backward(const NormRows& rows, int64_t begin, int64_t end, float* grad_weight) {
  with_dtype(rows.dtype,
             [&]<DType d>() { rms_norm_backward_of<d>(rows, begin, end, grad_weight); });
}

// Written as products and a sum: each pair has the same bits wherever it stands in a row.
template <DType d>
void rotate_of(const Rotation turn, int64_t begin, int64_t end) {
  const Floats sign = broadcast(turn.inverse ? -1.0f : 1.0f);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < turn.num_heads; ++h) {
      auto* low = row_of<d>(turn.x, t * turn.token_stride + h * turn.head_stride);
      auto* high = low + turn.half;
      for (int64_t i = 0; i < turn.half; i += kLanes) {
        const int64_t count = smaller(turn.half - i, kLanes);
        const Floats a = load_first<d>(low + i, count), b = load_first<d>(high + i, count);
        const Floats c = load_first(turn.cosine + t * turn.half + i, count);
        const Floats s = load_first(turn.sine + t * turn.half + i, count) * sign;
        store_first<d>(low + i, count, a * c - b * s);
        store_first<d>(high + i, count, b * c + a * s);
      }
    }
  }
}

void rotate(const Rotation& turn, int64_t begin, int64_t end) {
  with_dtype(turn.dtype, [&]<DType d>() { rotate_of<d>(turn, begin, end); });
}

// An activation x * sigmoid(z): the sigmoid, and the slope of 2 z / 2 for the backward.
struct Silu {
  static Floats exponent(Floats x) { return x * broadcast(-0x1.715476p0f); }
  static Floats slope(Floats) { return broadcast(1.0f); }
};

// gelu_tanh(x) = x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct Gelu {
  static constexpr float kTwice = 0x1.988454p0f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;

  static Floats exponent(Floats x) {
    const Floats cubic = broadcast(1.0f) + broadcast(kCubic) * x * x;
    return x * cubic * broadcast(-kTwice * 0x1.715476p0f);
  }
  static Floats slope(Floats x) {
    return broadcast(kTwice) * (broadcast(1.0f) + broadcast(3 * kCubic) * x * x);
  }
};

template <typename Activation>
Floats sigmoid(Floats x) {
  const Floats one = broadcast(1.0f);
  return one / (one + exp2(Activation::exponent(x)));
}

template <typename Activation, DType d>
void gated_of(const GatedRows rows, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const auto* gate = row_of<d>(rows.gate, r * rows.gate_stride);
    const auto* up = row_of<d>(rows.up, r * rows.up_stride);
    auto* out = row_of<d>(rows.out, r * rows.features);
    for (int64_t i = 0; i < rows.features; i += kLanes) {
      const int64_t count = smaller(rows.features - i, kLanes);
      const Floats x = load_first<d>(gate + i, count);
      store_first<d>(out + i, count, x * sigmoid<Activation>(x) * load_first<d>(up + i, count));
    }
  }
}

template <typename Activation, DType d>
void gated_backward_of(const GatedRows rows, int64_t begin, int64_t end) {
  const Floats one = broadcast(1.0f);
  for (int64_t r = begin; r < end; ++r) {
    const auto* gate = row_of<d>(rows.gate, r * rows.gate_stride);
    const auto* up = row_of<d>(rows.up, r * rows.up_stride);
    const auto* grad = row_of<d>(rows.grad, r * rows.features);
    auto* grad_gate = row_of<d>(rows.grad_gate, r * rows.features);
    auto* grad_up = row_of<d>(rows.grad_up, r * rows.features);
    for (int64_t i = 0; i < rows.features; i += kLanes) {
      const int64_t count = smaller(rows.features - i, kLanes);
      const Floats x = load_first<d>(gate + i, count);
      const Floats gradient = load_first<d>(grad + i, count);
      const Floats part = sigmoid<Activation>(x);
      // The smallest factors first: x times its slope may be infinite where they are zero.
      const Floats slope = part + part * (one - part) * x * Activation::slope(x);
      store_first<d>(grad_up + i, count, x * part * gradient);
      store_first<d>(grad_gate + i, count, slope * gradient * load_first<d>(up + i, count));
    }
  }
}

void gated(const GatedRows& rows, int64_t begin, int64_t end) {
  with_dtype(rows.dtype, [&]<DType d>() {
    rows.gelu ? gated_of<Gelu, d>(rows, begin, end) : gated_of<Silu, d>(rows, begin, end);
  });
}

void gated_backward(const GatedRows& rows, int64_t begin, int64_t end) {
  with_dtype(rows.dtype, [&]<DType d>() {
    rows.gelu ? gated_backward_of<Gelu, d>(rows, begin, end)
              : gated_backward_of<Silu, d>(rows, begin, end);
  });
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
