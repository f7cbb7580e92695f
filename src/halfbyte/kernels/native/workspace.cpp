#include "workspace.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace halfbyte {
namespace {

struct Buffer {
  void* data;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Buffer> idle;
  int64_t held = 0;  // bytes, idle and in use
};

// Never destroyed: threads may still multiply while the process exits.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

std::atomic<int64_t> limit{int64_t{128} << 20};

constexpr int64_t kPage = 2 << 20;  // huge pages, where the system grants them

}  // namespace

Workspace::Workspace(int64_t bytes) {
  take(bytes);
#if defined(__SANITIZE_ADDRESS__)
  // Every float is NaN: what reads before it writes is seen in its results.
  std::memset(data_, 0xff, static_cast<size_t>(bytes));
#endif
}

void Workspace::take(int64_t bytes) {
  const int64_t wanted = std::max<int64_t>(1, (bytes + kPage - 1) / kPage) * kPage;
  Pool& shared = pool();
  const std::lock_guard lock(shared.mutex);
  // The smallest that is large enough; else the largest idle one makes room for a larger.
  auto best = shared.idle.end();
  for (auto it = shared.idle.begin(); it != shared.idle.end(); ++it) {
    if (it->bytes >= wanted && (best == shared.idle.end() || it->bytes < best->bytes)) best = it;
  }
  if (best != shared.idle.end()) {
    data_ = best->data;
    bytes_ = best->bytes;
    shared.idle.erase(best);
    return;
  }
  if (!shared.idle.empty()) {
    const auto largest =
        std::max_element(shared.idle.begin(), shared.idle.end(),
                         [](const Buffer& a, const Buffer& b) { return a.bytes < b.bytes; });
    std::free(largest->data);
    shared.held -= largest->bytes;
    shared.idle.erase(largest);
  }
  data_ = std::aligned_alloc(kPage, static_cast<size_t>(wanted));
  if (data_ == nullptr) {
    throw std::runtime_error("halfbyte: no memory for a workspace of " + std::to_string(wanted) +
                             " bytes");
  }
  bytes_ = wanted;
  shared.held += wanted;
}

Workspace::~Workspace() {
  Pool& shared = pool();
  const std::lock_guard lock(shared.mutex);
  shared.idle.push_back({data_, bytes_});
}

torch::stable::Tensor Workspace::view(int64_t rows, int64_t columns,
                                      const torch::stable::Tensor& like) const {
  return torch::stable::from_blob(data_, {rows, columns}, {columns, 1}, like.device(),
                                  like.scalar_type());
}

int64_t workspace_limit() { return limit.load(std::memory_order_relaxed); }

void set_workspace_limit(int64_t bytes) {
  if (bytes < 1) throw std::runtime_error("workspace limit: at least 1 byte expected");
  limit.store(bytes, std::memory_order_relaxed);
}

int64_t workspace_bytes() {
  Pool& shared = pool();
  const std::lock_guard lock(shared.mutex);
  return shared.held;
}

void release_workspace() {
  Pool& shared = pool();
  const std::lock_guard lock(shared.mutex);
  for (const Buffer& buffer : shared.idle) {
    std::free(buffer.data);
    shared.held -= buffer.bytes;
  }
  shared.idle.clear();
}

STABLE_TORCH_LIBRARY_FRAGMENT(halfbyte, m) {
  m.def("workspace_limit() -> int");
  m.def("set_workspace_limit(int bytes) -> ()");
  m.def("workspace_bytes() -> int");
  m.def("release_workspace() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CompositeExplicitAutograd, m) {
  m.impl("workspace_limit", TORCH_BOX(&workspace_limit));
  m.impl("set_workspace_limit", TORCH_BOX(&set_workspace_limit));
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes));
  m.impl("release_workspace", TORCH_BOX(&release_workspace));
}

}  // namespace halfbyte
