// Memory of one thread, kept for its next call: no allocation in the steady state of a loop.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace halfbyte {

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// `count` elements, aligned to a cache line. The next call of the same thread may move them, and
// overwrites them: one user at a time.
template <typename T>
T* thread_memory(int64_t count) {
  static thread_local std::unique_ptr<void, FreeDeleter> memory;
  static thread_local int64_t size = 0;
  const int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  if (bytes > size) {
    memory.reset();  // before the new allocation, not after
    size = 0;
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(bytes)));
    if (!memory) throw std::runtime_error("halfbyte: no memory for a thread's scratch space");
    size = bytes;
  }
  return static_cast<T*>(memory.get());
}

}  // namespace halfbyte
