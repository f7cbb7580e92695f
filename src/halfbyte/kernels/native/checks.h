// Checks of operator arguments. All problems of a call go into one message.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "types.h"

namespace halfbyte {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

// What a message says of a tensor. Written out only when it is: checks that pass cost no text.
struct Description {
  const Tensor& t;

  friend std::ostream& operator<<(std::ostream& text, const Description& description) {
    const Tensor& t = description.t;
    if (!t.defined()) return text << "none";
    text << torch::headeronly::toString(t.scalar_type()) << " [";
    for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
    text << (t.is_contiguous() ? "]" : "], not contiguous");
    return text << (t.is_cpu() ? "" : ", not on the CPU");
  }
};

inline Description describe(const Tensor& t) { return {t}; }

// Parts of a message, one after the other; for use in the same statement.
template <typename... Parts>
struct Text {
  std::tuple<const Parts&...> parts;

  friend std::ostream& operator<<(std::ostream& stream, const Text& text) {
    std::apply([&](const Parts&... part) { (stream << ... << part); }, text.parts);
    return stream;
  }
};

template <typename... Parts>
Text<Parts...> text(const Parts&... parts) {
  return {std::tie(parts...)};
}

inline bool is_aligned(const Tensor& t) {
  return t.numel() == 0 || reinterpret_cast<uintptr_t>(t.data_ptr()) % t.element_size() == 0;
}

inline std::optional<DType> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

class Problems {
 public:
  explicit Problems(const char* op) : op_(op) {}

  template <typename Expected, typename Found>
  void expect(bool good, const char* name, const Expected& expected, const Found& found) {
    if (good) return;
    std::ostringstream problem;
    problem << "\n  " << name << ": " << expected << " expected, found " << found;
    text_ += problem.str();
  }

  // A contiguous, aligned tensor on the CPU with `numel` elements.
  bool expect_vector(const Tensor& t, const char* name, ScalarType type, int64_t numel) {
    const bool good = t.defined() && t.is_cpu() && t.scalar_type() == type && t.numel() == numel &&
                      t.is_contiguous() && is_aligned(t);
    expect(good, name, text("contiguous, aligned ", type, " with ", numel, " elements on the CPU"),
           describe(t));
    return good;
  }

  // A tensor of a dtype that can be quantized or multiplied.
  void expect_float(const Tensor& t, const char* name, bool contiguous) {
    const bool good = t.defined() && t.is_cpu() && dtype_of(t).has_value() && is_aligned(t) &&
                      (!contiguous || t.is_contiguous());
    expect(good, name,
           contiguous ? "contiguous, aligned float32, bfloat16 or float16 on the CPU"
                      : "aligned float32, bfloat16 or float16 on the CPU",
           describe(t));
  }

  // A codebook: `size` finite values.
  void expect_table(const Tensor& t, const char* name, int64_t size) {
    if (!expect_vector(t, name, ScalarType::Float, size)) return;
    const auto* values = static_cast<const float*>(t.const_data_ptr());
    for (int64_t i = 0; i < size; ++i) {
      if ((float_to_bits(values[i]) & kAbsMask) >= kInfinityBits) {
        expect(false, name, "finite values", text("one that is not at ", i));
        return;
      }
    }
  }

  void expect_block_size(int64_t size) {
    expect(size >= 32 && size <= kMaxBlockSize && (size & (size - 1)) == 0, "block_size",
           "a power of two from 32 to 4096", size);
  }

  void expect_positive(int64_t value, const char* name) {
    expect(value >= 1, name, "at least 1", value);
  }

  // Throws if anything was found.
  void raise() const {
    if (!text_.empty()) throw std::runtime_error(op_ + text_);
  }

 private:
  const char* op_;
  std::string text_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace halfbyte
