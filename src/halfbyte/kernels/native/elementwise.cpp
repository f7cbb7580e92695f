// rms_norm and rotate_: what stands between two products of a decoder layer.
//
// Rows go through a float32 buffer, so that each step is a plain loop that the compiler turns into
// vector instructions. The work is far too small to choose an instruction set for.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "types.h"

namespace halfbyte {
namespace {

// Elements that a thread should get at least: about 10 microseconds of work.
constexpr int64_t kGrain = 1 << 14;

void load(const void* source, DType dtype, int64_t begin, int64_t count, float* out) {
  if (dtype == DType::kFloat32) {
    std::copy_n(static_cast<const float*>(source) + begin, count, out);
    return;
  }
  const auto* half = static_cast<const uint16_t*>(source) + begin;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(half[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = float16_to_float(half[i]);
  }
}

void store(const float* values, DType dtype, int64_t begin, int64_t count, void* target) {
  if (dtype == DType::kFloat32) {
    std::copy_n(values, count, static_cast<float*>(target) + begin);
    return;
  }
  auto* half = static_cast<uint16_t*>(target) + begin;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_bfloat16(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_float16(values[i]);
  }
}

float sum_of_squares(const float* x, int64_t count) {
  // Lanes in a fixed order: the compiler may not reorder a single sum.
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  }
  for (int64_t j = 0; i < count; ++i, ++j) lanes[j] += x[i] * x[i];
  for (int64_t width = kLanes / 2; width; width /= 2) {
    for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// Runs over [0, count), in this thread alone when the work is not worth waking another.
template <typename Body>
void over_rows(int64_t count, int64_t elements_each, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_each));
  if (count <= grain) {
    body(0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, body);
  }
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t features = x.dim() ? x.size(x.dim() - 1) : 0;
  Problems problems("halfbyte::rms_norm");
  problems.expect_float(x, "x", /*contiguous=*/true);
  problems.expect_positive(features, "features");
  problems.expect_vector(weight, "weight", ScalarType::Float, features);
  problems.raise();

  const Tensor out = torch::stable::empty_like(x);
  const DType dtype = *dtype_of(x);
  const void* source = x.const_data_ptr();
  const auto* scale = static_cast<const float*>(weight.const_data_ptr());
  void* target = out.mutable_data_ptr();
  over_rows(x.numel() / features, features, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(features));
    for (int64_t r = begin; r < end; ++r) {
      load(source, dtype, r * features, features, row.data());
      const float mean = sum_of_squares(row.data(), features) / float(features);
      const float inverse = 1.0f / std::sqrt(mean + float(eps));
      for (int64_t i = 0; i < features; ++i) row[size_t(i)] = row[size_t(i)] * inverse * scale[i];
      store(row.data(), dtype, r * features, features, target);
    }
  });
  return out;
}

void rotate(Tensor& x, const Tensor& cosine, const Tensor& sine) {
  Problems problems("halfbyte::rotate_");
  problems.expect(x.dim() == 3 && x.size(2) % 2 == 0, "x", "[T, H, 2 F]", describe(x));
  problems.raise();
  const int64_t tokens = x.size(0), heads = x.size(1), half = x.size(2) / 2;
  problems.expect_float(x, "x", /*contiguous=*/true);
  problems.expect_vector(cosine, "cosine", ScalarType::Float, tokens * half);
  problems.expect_vector(sine, "sine", ScalarType::Float, tokens * half);
  problems.raise();

  const DType dtype = *dtype_of(x);
  void* data = x.mutable_data_ptr();
  const auto* cosines = static_cast<const float*>(cosine.const_data_ptr());
  const auto* sines = static_cast<const float*>(sine.const_data_ptr());
  over_rows(tokens, 2 * heads * half, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(static_cast<size_t>(4 * half));
    float* in = buffer.data();
    float* out = in + 2 * half;
    for (int64_t t = begin; t < end; ++t) {
      const float* c = cosines + t * half;
      const float* s = sines + t * half;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t first = (t * heads + h) * 2 * half;
        load(data, dtype, first, 2 * half, in);
        for (int64_t i = 0; i < half; ++i) out[i] = in[i] * c[i] - in[i + half] * s[i];
        for (int64_t i = 0; i < half; ++i) out[i + half] = in[i + half] * c[i] + in[i] * s[i];
        store(out, dtype, first, 2 * half, data);
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rotate_", TORCH_BOX(&rotate));
}

}  // namespace
}  // namespace halfbyte
