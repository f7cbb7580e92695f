#include "activations.h"

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>

#include "checks.h"

namespace halfbyte {
namespace {

constexpr int64_t kSlack = 8;    // a block becomes one that differs by up to an eighth
constexpr int64_t kAlways = 32;  // a 32nd of the most may be kept whatever else arrives

struct Block {
  void* data;
  int64_t bytes;
};

// Bytes in use, the most since `release`, kept, and ever taken from the system.
struct Usage {
  int64_t used, most, kept, fresh;
};

// To whole pages, whose size is the system's.
int64_t round_up(int64_t bytes) {
  static const int64_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

class Pool {
 public:
  // For tensors of `least` bytes and more; 0 turns reuse off.
  void configure(int64_t least, int64_t beside) {
    const std::lock_guard lock(mutex_);
    least_ = least;
    beside_ = beside;
    forget();
  }

  bool serves(int64_t bytes) const {
    const int64_t least = least_.load(std::memory_order_relaxed);
    return least > 0 && bytes >= least;
  }

  Block take(int64_t tensor_bytes) {
    const std::lock_guard lock(mutex_);
    const int64_t bytes = round_up(tensor_bytes);
    const Block old = take_similar(bytes);
    // Room for what is new of it, before it is there.
    const int64_t most = most_;
    most_ = std::max(most_, used_ + bytes);
    drop_to(room(used_ + bytes));
    void* data = old.data == nullptr ? map(bytes) : resize(old, bytes);
    if (data == MAP_FAILED) {
      most_ = most;
      throw std::runtime_error("halfbyte: cannot allocate memory for an activation of " +
                               std::to_string(bytes) + " bytes");
    }
    used_ += bytes;
    return {data, bytes};
  }

  void give_back(Block block) {
    const std::lock_guard lock(mutex_);
    used_ -= block.bytes;
    idle_.push_back(block);
    kept_ += block.bytes;
    drop_to(least_.load(std::memory_order_relaxed) > 0 ? room(used_) : 0);
  }

  // Gives back what is kept; from now on it counts what is in use at once anew.
  void release() {
    const std::lock_guard lock(mutex_);
    forget();
  }

  // Leaves so much of the most to somebody else.
  void lend(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    lent_ = bytes;
    drop_to(room(used_));
  }

  Usage usage() {
    const std::lock_guard lock(mutex_);
    return {used_, most_, kept_, fresh_};
  }

 private:
  // What may be kept beside so much in use.
  int64_t room(int64_t used) const {
    const int64_t left = most_ - lent_ - used;
    return std::max({int64_t{0}, left - beside_, std::min(left, most_ / kAlways)});
  }

  void forget() {
    drop_to(0);
    most_ = used_;
    lent_ = 0;
  }

  // Takes the idle block that is nearest in size; of equals the latest, whose contents are most
  // likely in cache. Null if none is near.
  Block take_similar(int64_t bytes) {
    auto best = idle_.end();
    const auto distance = [bytes](const Block& block) { return std::abs(block.bytes - bytes); };
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      const bool near = distance(*it) <= bytes / kSlack;
      if (near && (best == idle_.end() || distance(*it) <= distance(*best))) best = it;
    }
    if (best == idle_.end()) return {nullptr, 0};
    const Block block = *best;
    idle_.erase(best);
    kept_ -= block.bytes;
    return block;
  }

  // The oldest go first.
  void drop_to(int64_t bytes) {
    while (kept_ > bytes) {
      const Block block = idle_.front();
      idle_.pop_front();
      munmap(block.data, static_cast<size_t>(block.bytes));
      kept_ -= block.bytes;
    }
  }

  // MAP_FAILED where there is no memory, whatever is given back for it.
  void* map(int64_t bytes) {
    const auto fresh = [bytes] {
      return mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    };
    void* data = fresh();
    if (data == MAP_FAILED) {
      drop_to(0);
      data = fresh();
    }
    if (data != MAP_FAILED) fresh_ += bytes;
    return data;
  }

  // What it holds is not needed. Linux moves pages by their addresses, so that only those which are
  // added are fresh; elsewhere, and where that fails, all are.
  void* resize(Block old, int64_t bytes) {
    if (old.bytes >= bytes) {
      if (old.bytes > bytes) {
        munmap(static_cast<char*>(old.data) + bytes, static_cast<size_t>(old.bytes - bytes));
      }
      return old.data;
    }
#if defined(__linux__)
    void* data = mremap(old.data, static_cast<size_t>(old.bytes), static_cast<size_t>(bytes),
                        MREMAP_MAYMOVE);
    if (data != MAP_FAILED) {
      fresh_ += bytes - old.bytes;
      return data;
    }
#endif
    munmap(old.data, static_cast<size_t>(old.bytes));
    return map(bytes);
  }

  std::mutex mutex_;
  std::atomic<int64_t> least_{0};
  std::deque<Block> idle_;
  int64_t beside_ = 0, lent_ = 0, kept_ = 0, used_ = 0, most_ = 0, fresh_ = 0;  // bytes
};

// Never destroyed: tensors may outlive everything else.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// Bytes of a dense tensor, or -1 where they do not fit into an integer.
int64_t bytes_of(const std::vector<int64_t>& shape, int64_t element) {
  int64_t bytes = element;
  for (const int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes)) return -1;
  }
  return bytes;
}

std::vector<int64_t> strides_of(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

void reuse_activations(int64_t least, int64_t beside) {
  Problems problems("halfbyte::reuse_activations");
  problems.expect(least >= 0, "least", "0, or a number of bytes", least);
  problems.expect(beside >= 0, "beside", "0, or a number of bytes", beside);
  problems.raise();
  pool().configure(least, beside);
}

void release_activations() { pool().release(); }

void lend_activations(int64_t bytes) {
  Problems problems("halfbyte::lend_activations");
  problems.expect(bytes >= 0, "bytes", "0, or a number of bytes", bytes);
  problems.raise();
  pool().lend(bytes);
}

std::vector<int64_t> activation_usage() {
  const Usage usage = pool().usage();
  return {usage.used, usage.most, usage.kept, usage.fresh};
}

}  // namespace

Tensor activation(const Tensor& like, std::vector<int64_t> shape, std::optional<ScalarType> dtype) {
  const ScalarType wanted = dtype.value_or(like.scalar_type());
  const int64_t element = wanted == ScalarType::Float ? 4 : 2;
  const bool known =
      wanted == ScalarType::Float || wanted == ScalarType::BFloat16 || wanted == ScalarType::Half;
  const int64_t bytes = known && like.is_cpu() ? bytes_of(shape, element) : -1;
  if (!pool().serves(bytes)) return torch::stable::new_empty(like, shape, wanted);
  const Block block = pool().take(bytes);
  return torch::stable::from_blob(
      block.data, shape, strides_of(shape), like.device(), wanted,
      [size = block.bytes](void* data) { pool().give_back({data, size}); });
}

Tensor activation_like(const Tensor& like) {
  return activation(like, std::vector<int64_t>(like.sizes().begin(), like.sizes().end()));
}

STABLE_TORCH_LIBRARY_FRAGMENT(halfbyte, m) {
  m.def("reuse_activations(int least, int beside) -> ()");
  m.def("release_activations() -> ()");
  m.def("lend_activations(int bytes) -> ()");
  m.def("activation_usage() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CompositeExplicitAutograd, m) {
  m.impl("reuse_activations", TORCH_BOX(&reuse_activations));
  m.impl("release_activations", TORCH_BOX(&release_activations));
  m.impl("lend_activations", TORCH_BOX(&lend_activations));
  m.impl("activation_usage", TORCH_BOX(&activation_usage));
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) { m.impl("activation", TORCH_BOX(&activation)); }

}  // namespace halfbyte
