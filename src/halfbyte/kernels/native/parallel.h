// Work shared out among PyTorch's threads as they become free.
//
// PyTorch cuts a range into one piece a thread, so that everybody waits for the slowest. Costs
// differ, and so do threads: on a machine that runs other programs too, one of two cores may be
// away for milliseconds. Which thread does a piece changes no bit of the result.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace halfbyte {

// Calls body(task, thread) for tasks [0, count) on at most `threads` threads, tasks in order.
template <typename Body>
void run_tasks(int64_t count, int64_t threads, const Body& body) {
  threads = std::min(threads, count);
  if (threads <= 1) {
    for (int64_t task = 0; task < count; ++task) body(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        body(task, thread);
      }
    }
  });
}

// Calls body(begin, end) over [0, count) in pieces of at least `grain`, several for each thread.
// A range of one grain is left to the calling thread: waking another would take longer.
template <typename Body>
void run_range(int64_t count, int64_t grain, const Body& body) {
  constexpr int64_t kPieces = 8;  // for each thread, where the grain allows
  grain = std::max<int64_t>(1, grain);
  if (count <= grain) {
    if (count > 0) body(0, count);
    return;
  }
  const auto threads = int64_t(torch::stable::get_num_threads());
  const int64_t piece = std::max(grain, (count + threads * kPieces - 1) / (threads * kPieces));
  run_tasks((count + piece - 1) / piece, threads, [&](int64_t task, int64_t) {
    body(task * piece, std::min(count, (task + 1) * piece));
  });
}

}  // namespace halfbyte
