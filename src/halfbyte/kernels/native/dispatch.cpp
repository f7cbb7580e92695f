#include "dispatch.h"

#include <atomic>
#include <stdexcept>
#include <vector>

namespace halfbyte {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> result;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bf16");
  if (avx2 && avx512) result.push_back(&kAvx512Bf16);
  if (avx2) result.push_back(&kAvx2);
#endif
  result.push_back(&kPortable);
  return result;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::string available_kernels() {
  std::string names;
  for (const Kernels* each : supported()) {
    if (!names.empty()) names += ',';
    names += each->name;
  }
  return names;
}

void use_kernels(const std::string& name) {
  for (const Kernels* each : supported()) {
    if (name == each->name) {
      current().store(each, std::memory_order_relaxed);
      return;
    }
  }
  throw std::runtime_error("no kernels named '" + name +
                           "' run on this machine; those that do: " + available_kernels());
}

}  // namespace halfbyte
