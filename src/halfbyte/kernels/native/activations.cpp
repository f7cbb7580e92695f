#include "activations.h"

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

#include "checks.h"

namespace halfbyte {
namespace {

constexpr int64_t kSlack = 8;               // a block becomes one that is up to an eighth smaller
constexpr int64_t kAlways = 32;             // a 32nd of the most may be kept whatever else arrives
constexpr int64_t kLeastPiece = 64 * 1024;  // bytes; below that moving is not worth a mapping
constexpr int64_t kMostBytes = int64_t{1} << 60;  // sums of a few such sizes do not overflow
constexpr size_t kMostSeams = 16384;  // a quarter of the mappings Linux allows a process

struct Block {
  char* data;
  int64_t bytes;
};

// Bytes in use, the most since `release`, kept, ever taken from the system, and out on loan.
struct Usage {
  int64_t used, most, kept, fresh, out;
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
    return least > 0 && bytes >= least && bytes <= kMostBytes;
  }

  Block take(int64_t tensor_bytes) {
    const std::lock_guard lock(mutex_);
    const int64_t bytes = round_up(tensor_bytes);
    const int64_t most = most_;
    most_ = std::max(most_, used_ + bytes);
    used_ += bytes;
    try {
      return find(bytes);
    } catch (...) {
      used_ -= bytes;
      most_ = most;
      throw;
    }
  }

  void give_back(Block block) {
    const std::lock_guard lock(mutex_);
    used_ -= block.bytes;
    keep(block);
  }

  // For somebody else; `loan` is the one it belongs to, 0 for none.
  Block take_lent(int64_t lent_bytes, int64_t& loan) {
    const std::lock_guard lock(mutex_);
    const int64_t bytes = round_up(lent_bytes);
    loan = out_ + bytes <= lent_ ? loan_ : 0;
    const int64_t counted = loan > 0 ? bytes : 0;
    out_ += counted;
    try {
      return find(bytes);
    } catch (...) {
      out_ -= counted;
      throw;
    }
  }

  void give_back_lent(Block block, int64_t loan) {
    const std::lock_guard lock(mutex_);
    if (loan == loan_) out_ -= block.bytes;
    keep(block);
  }

  // Gives back what is kept; from now on it counts what is in use at once anew.
  void release() {
    const std::lock_guard lock(mutex_);
    forget();
  }

  // Leaves so much of the most to somebody else; 0 ends the loan, and what is out is not of it.
  void lend(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    lent_ = bytes;
    if (bytes == 0) {
      out_ = 0;
      ++loan_;
    }
  }

  Usage usage() {
    const std::lock_guard lock(mutex_);
    return {used_, most_, kept_, fresh_, out_};
  }

 private:
  struct Idle {
    int64_t bytes;
    int64_t age;  // the larger, the later it was given back
  };
  using Place = std::map<char*, Idle>::iterator;
  struct Row {  // of idle blocks side by side
    Place first;
    int64_t bytes;
  };

  // What may be kept.
  int64_t room() const {
    if (least_.load(std::memory_order_relaxed) == 0) return 0;
    const int64_t left = most_ - out_ - used_;
    return std::max({int64_t{0}, left - beside_, std::min(left, most_ / kAlways)});
  }

  void forget() {
    most_ = used_;
    lent_ = 0;
    drop_to(0);
  }

  void keep(Block block) {
    idle_[block.data] = {block.bytes, ++age_};
    kept_ += block.bytes;
    drop_to(room());
  }

  // The shortest rows go first, which fit the fewest: of the last one as much as has to.
  void drop_to(int64_t bytes) {
    while (kept_ > bytes) {
      const Row row = shortest_row(1);
      unmap(cut(row.first, std::min(row.bytes, round_up(kept_ - bytes))));
    }
  }

  // A block for what was counted already; what is fresh of it takes the place of what is kept.
  Block find(int64_t bytes) {
    Block block = cut(similar(bytes), bytes);
    if (block.data == nullptr) block = cut(shortest_row(bytes).first, bytes);
    if (block.data == nullptr) block = put_together(bytes);
    drop_to(room());
    return block;
  }

  // The idle block that is as large or a little larger; of equals the latest, whose contents are
  // most likely in cache.
  Place similar(int64_t bytes) {
    Place best = idle_.end();
    for (Place it = idle_.begin(); it != idle_.end(); ++it) {
      const Idle& idle = it->second;
      if (idle.bytes < bytes || idle.bytes > bytes + bytes / kSlack) continue;
      const bool better = best == idle_.end() || idle.bytes < best->second.bytes ||
                          (idle.bytes == best->second.bytes && idle.age > best->second.age);
      if (better) best = it;
    }
    return best;
  }

  // The shortest row of so many bytes or more; without bytes if there is none.
  Row shortest_row(int64_t bytes) {
    Row best{idle_.end(), 0}, row{idle_.end(), 0};
    char* end = nullptr;
    for (Place it = idle_.begin();; ++it) {
      if (it == idle_.end() || it->first != end) {
        if (row.bytes >= bytes && (best.bytes == 0 || row.bytes < best.bytes)) best = row;
        if (it == idle_.end()) return best;
        row = {it, 0};
      }
      row.bytes += it->second.bytes;
      end = it->first + it->second.bytes;
    }
  }

  // Makes a block of idle ones from here on; what is too much of the last stays idle.
  Block cut(Place first, int64_t bytes) {
    if (first == idle_.end()) return {nullptr, 0};
    const Block block{first->first, bytes};
    int64_t missing = bytes;
    for (Place it = first; missing > 0;) {
      const Idle idle = it->second;
      char* const data = it->first;
      it = idle_.erase(it);
      if (idle.bytes > missing) idle_[data + missing] = {idle.bytes - missing, idle.age};
      missing -= std::min(missing, idle.bytes);
    }
    kept_ -= bytes;
    return block;
  }

  // Of what is kept, moved to one place, and the rest fresh. Linux moves pages by their addresses;
  // elsewhere all is fresh.
  Block put_together(int64_t bytes) {
    const Block block{map(bytes), bytes};
    int64_t filled = 0;
#if defined(__linux__)
    while (bytes - filled >= kLeastPiece && seams_.size() < kMostSeams) {
      const Row row = shortest_row(kLeastPiece);
      if (row.bytes == 0) break;
      const int64_t movable = std::min(row.bytes, to_seam(row.first->first));
      const Block piece = cut(row.first, std::min(movable, bytes - filled));
      if (!move(piece, block.data + filled)) {
        unmap(block);
        fail(bytes);
      }
      filled += piece.bytes;
    }
#endif
    return block;
  }

#if defined(__linux__)
  int64_t to_seam(char* place) const {
    const auto seam = seams_.upper_bound(place);
    return seam == seams_.end() ? std::numeric_limits<int64_t>::max() : *seam - place;
  }

  // To where something fresh is. Where the system refuses, that stays or is made anew, and the
  // piece is given back; false if there is no memory.
  bool move(Block piece, char* there) {
    const size_t size = static_cast<size_t>(piece.bytes);
    if (mremap(piece.data, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, there) != MAP_FAILED) {
      fresh_ -= piece.bytes;
      forget_seams(piece);
    } else {
      unmap(piece);
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
      if (mmap(there, size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return false;
    }
    seams_.insert({there, there + piece.bytes});
    return true;
  }
#endif

  // From the system, if need be for all that is kept.
  char* map(int64_t bytes) {
    const auto fresh = [bytes] {
      return mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    };
    void* found = fresh();
    if (found == MAP_FAILED) {
      drop_to(0);
      found = fresh();
    }
    if (found == MAP_FAILED) fail(bytes);
    char* const data = static_cast<char*>(found);
    seams_.insert({data, data + bytes});
    fresh_ += bytes;
    return data;
  }

  [[noreturn]] static void fail(int64_t bytes) {
    throw std::runtime_error("halfbyte: cannot allocate memory for an activation of " +
                             std::to_string(bytes) + " bytes");
  }

  void unmap(Block block) {
    munmap(block.data, static_cast<size_t>(block.bytes));
    forget_seams(block);
  }

  // Nothing is there any more, so nothing meets there.
  void forget_seams(Block block) {
    seams_.erase(seams_.lower_bound(block.data), seams_.upper_bound(block.data + block.bytes));
  }

  std::mutex mutex_;
  std::atomic<int64_t> least_{0};
  std::map<char*, Idle> idle_;  // by address
  std::set<char*> seams_;  // where separate mappings may meet; the system moves no more than one
  int64_t age_ = 0, loan_ = 1;
  int64_t beside_ = 0, lent_ = 0, out_ = 0, kept_ = 0, used_ = 0, most_ = 0, fresh_ = 0;  // bytes
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

Tensor lent_buffer(int64_t bytes) {
  Problems problems("halfbyte::lent_buffer");
  problems.expect(bytes > 0 && bytes <= kMostBytes, "bytes", "a number of bytes", bytes);
  problems.raise();
  int64_t loan = 0;
  const Block block = pool().take_lent(bytes, loan);
  return torch::stable::from_blob(
      block.data, {bytes}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Byte, [block, loan](void*) { pool().give_back_lent(block, loan); });
}

std::vector<int64_t> activation_usage() {
  const Usage usage = pool().usage();
  return {usage.used, usage.most, usage.kept, usage.fresh, usage.out};
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
  return torch::stable::from_blob(block.data, shape, strides_of(shape), like.device(), wanted,
                                  [block](void*) { pool().give_back(block); });
}

Tensor activation_like(const Tensor& like) {
  return activation(like, std::vector<int64_t>(like.sizes().begin(), like.sizes().end()));
}

STABLE_TORCH_LIBRARY_FRAGMENT(halfbyte, m) {
  m.def("reuse_activations(int least, int beside) -> ()");
  m.def("release_activations() -> ()");
  m.def("lend_activations(int bytes) -> ()");
  m.def("lent_buffer(int bytes) -> Tensor");
  m.def("activation_usage() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CompositeExplicitAutograd, m) {
  m.impl("reuse_activations", TORCH_BOX(&reuse_activations));
  m.impl("release_activations", TORCH_BOX(&release_activations));
  m.impl("lend_activations", TORCH_BOX(&lend_activations));
  m.impl("lent_buffer", TORCH_BOX(&lent_buffer));
  m.impl("activation_usage", TORCH_BOX(&activation_usage));
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) { m.impl("activation", TORCH_BOX(&activation)); }

}  // namespace halfbyte
