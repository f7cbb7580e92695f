// Prints a hash of what each portable kernel makes of the same numbers, for `aarch64.sh`.

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "kernels.h"

namespace {

using namespace halfbyte;

constexpr int64_t kOutputs = 96, kInputs = 256, kBlock = 64, kNumel = kOutputs * kInputs;

class Numbers {
 public:
  float next() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state_) >> 8) * 0x1p-22f;
  }

  std::vector<float> take(int64_t count) {
    std::vector<float> numbers(static_cast<size_t>(count));
    for (float& number : numbers) number = next();
    return numbers;
  }

 private:
  uint32_t state_ = 1;
};

template <typename T>
void print(const char* what, const std::vector<T>& values) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  std::printf("%-24s %016llx\n", what, static_cast<unsigned long long>(hash));
}

Ranks ranks_of(const float* table) {
  Ranks ranks{};
  for (uint32_t i = 0; i < 16; ++i) {
    ranks.codes[i] = i;
    ranks.midpoints[i] =
        i < 15 ? (table[i] + table[i + 1]) / 2 : std::numeric_limits<float>::infinity();
  }
  return ranks;
}

void multiply(const Quantized& weight, DType dtype, Numbers& numbers, const char* name) {
  const size_t element = dtype == DType::kFloat32 ? 4 : 2;
  std::vector<uint8_t> dense(kNumel * element);
  kPortable.dequantize_4bit(weight, 0, kNumel, dtype, dense.data());
  print(name, dense);

  const LinearShape shape{1, kInputs, kOutputs};
  std::vector<uint8_t> x(kInputs * element), y(kOutputs * element);
  for (int64_t i = 0; i < kInputs; ++i) {
    const float number = numbers.next();
    auto* halves = reinterpret_cast<uint16_t*>(x.data());
    if (dtype == DType::kFloat32) reinterpret_cast<float*>(x.data())[i] = number;
    if (dtype == DType::kBFloat16) halves[i] = float_to_bfloat16(number);
    if (dtype == DType::kFloat16) halves[i] = float_to_float16(number);
  }
  const int64_t bytes = kPortable.prepared_bytes(weight, shape, dtype);
  std::vector<float> prepared(static_cast<size_t>(bytes) / sizeof(float) + 1);
  kPortable.prepare(weight, shape, dtype, x.data(), 0, 1, prepared.data());
  kPortable.linear(weight, shape, dtype, prepared.data(), 0, kOutputs, nullptr, y.data());
  print("  one row times it", y);
}

}  // namespace

int main() {
  Numbers numbers;
  float table[16];
  for (int i = 0; i < 16; ++i) table[i] = -1.0f + static_cast<float>(i) / 7.5f;
  const std::vector<float> x = numbers.take(kNumel);
  std::vector<uint8_t> codes(kNumel / 2);
  std::vector<float> scales(kNumel / kBlock);
  kPortable.quantize_4bit(x.data(), DType::kFloat32, kNumel, kBlock, ranks_of(table), 0,
                          kNumel / kBlock, codes.data(), scales.data());
  print("codes", codes);
  print("scales", scales);

  const Quantized weight{
      codes.data(), table, {scales.data(), nullptr, nullptr, nullptr, 0, 0}, kBlock, kNumel};
  multiply(weight, DType::kFloat32, numbers, "weight, float32");
  multiply(weight, DType::kBFloat16, numbers, "weight, bfloat16");
  multiply(weight, DType::kFloat16, numbers, "weight, float16");

  const AdamWScalars scalars{0.999f, 0.1f, 0.999f, 0.001f, 0.9f, 1e-8f, 1e-3f};
  const std::vector<float> gradient = numbers.take(kNumel);
  std::vector<float> parameter = x, first(kNumel), second(kNumel), root(kNumel);
  kPortable.adamw_moments(scalars, gradient.data(), first.data(), second.data(), root.data(),
                          kNumel);
  for (float& value : root) value = std::sqrt(value);
  kPortable.adamw_apply(scalars, first.data(), root.data(), parameter.data(), kNumel);
  print("adamw, second moments", second);
  print("adamw, parameters", parameter);
}
