// The operators of halfbyte/kernels/attention.py for the CPU: check, cut into tasks, call the
// kernels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <tuple>
#include <vector>

#include "activations.h"
#include "checks.h"
#include "dispatch.h"
#include "parallel.h"
#include "workspace.h"

namespace halfbyte {
namespace {

// Multiplications that a thread should get at least: about 10 microseconds of work.
constexpr double kGrain = 1 << 18;
// Floats of query gradients that a task holds at most; a longer document is cut.
constexpr int64_t kMostHeld = 4 << 20;
// Elements of a sum of products that a thread should get at least.
constexpr int64_t kDeltaGrain = 1 << 14;

using Task = AttentionTask;

// A tensor [tokens, heads, features] whose features are consecutive, and how it is laid out.
struct Rows {
  Tensor tensor;
  Heads heads;

  explicit Rows(const Tensor& t)
      : tensor(t.numel() == 0 || t.stride(2) == 1 ? t : torch::stable::contiguous(t)),
        heads{tensor.data_ptr(), tensor.stride(0), tensor.stride(1)} {}
};

struct Inputs {
  const Tensor &q, &k, &v, &cu_seqlens_q, &cu_seqlens_k;
  double scale;
  std::optional<int64_t> window;
  std::optional<double> softcap;
};

void expect_heads(const Tensor& t, const char* name, ScalarType type,
                  const std::vector<int64_t>& sizes, Problems& problems) {
  const bool good = t.defined() && t.is_cpu() && t.scalar_type() == type && is_aligned(t) &&
                    std::equal(sizes.begin(), sizes.end(), t.sizes().begin(), t.sizes().end());
  if (good) return;
  std::string shape;
  for (const int64_t size : sizes) shape += (shape.empty() ? "[" : ", ") + std::to_string(size);
  problems.expect(false, name, text("aligned ", type, " ", shape, "] on the CPU"), describe(t));
}

// Bounds from 0 to `total` that never fall; empty if they are not.
std::vector<int64_t> read_bounds(const Tensor& t, const char* name, int64_t total,
                                 Problems& problems) {
  const bool readable = t.defined() && t.is_cpu() && t.scalar_type() == ScalarType::Int &&
                        t.dim() == 1 && t.numel() >= 2 && t.is_contiguous() && is_aligned(t);
  problems.expect(readable, name, "contiguous, aligned Int [B + 1] on the CPU", describe(t));
  if (!readable) return {};
  const auto* first = static_cast<const int32_t*>(t.const_data_ptr());
  std::vector<int64_t> bounds(first, first + t.numel());
  const bool rising =
      bounds.front() == 0 && bounds.back() == total && std::is_sorted(bounds.begin(), bounds.end());
  problems.expect(rising, name, text("rising numbers from 0 to ", total), "others");
  return rising ? bounds : std::vector<int64_t>{};
}

std::vector<Segment> read_segments(const Inputs& in, Problems& problems) {
  const auto queries = read_bounds(in.cu_seqlens_q, "cu_seqlens_q", in.q.size(0), problems);
  const auto keys = read_bounds(in.cu_seqlens_k, "cu_seqlens_k", in.k.size(0), problems);
  if (queries.empty() || keys.empty()) return {};
  const bool paired = queries.size() == keys.size();
  problems.expect(paired, "cu_seqlens_k", text(queries.size(), " numbers"), keys.size());
  std::vector<Segment> segments;
  for (size_t b = 0; paired && b + 1 < queries.size(); ++b) {
    segments.push_back({queries[b], queries[b + 1] - queries[b], keys[b], keys[b + 1] - keys[b]});
    problems.expect(segments.back().num_keys >= segments.back().num_queries, "cu_seqlens_k",
                    text("no fewer keys than queries in segment ", b), "fewer");
  }
  return segments;
}

// The call, checked, but for where its results go.
Attention check(const Inputs& in, std::vector<Segment>& segments, Problems& problems) {
  problems.expect_float(in.q, "q", /*contiguous=*/false);
  problems.expect(in.q.defined() && in.q.dim() == 3, "q", "[T, H, D]", describe(in.q));
  problems.expect(in.k.defined() && in.k.dim() == 3, "k", "[S, G, D]", describe(in.k));
  problems.raise();
  const int64_t heads = in.q.size(1), features = in.q.size(2);
  const int64_t keys = in.k.size(0), groups = in.k.size(1);
  problems.expect_positive(heads, "heads");
  problems.expect_positive(features, "features");
  problems.expect(groups >= 1 && heads % groups == 0, "k",
                  text("a number of heads that divides ", heads), describe(in.k));
  expect_heads(in.k, "k", in.q.scalar_type(), {keys, groups, features}, problems);
  expect_heads(in.v, "v", in.q.scalar_type(), {keys, groups, features}, problems);
  problems.expect(std::isfinite(in.scale), "scale", "a finite number", in.scale);
  if (in.window) problems.expect_positive(*in.window, "window");
  problems.expect(!in.softcap || (std::isfinite(*in.softcap) && float(*in.softcap) > 0), "softcap",
                  "a positive number", in.softcap.value_or(0));
  segments = read_segments(in, problems);
  problems.raise();
  Attention a{};
  a.dtype = *dtype_of(in.q);
  a.num_heads = heads;
  a.num_groups = groups;
  a.head_dim = features;
  a.num_queries = in.q.size(0);
  a.scale = float(in.scale);
  a.softcap = float(in.softcap.value_or(0));
  a.window = in.window.value_or(std::numeric_limits<int64_t>::max());
  return a;
}

// Pairs of a query and a key that the task goes through.
double pairs_of(const Attention& a, const Task& task) {
  double pairs = 0;
  for (int64_t i = task.first_query; i < task.last_query; ++i) {
    const int64_t first = std::max(task.segment.first_key(i, a.window), task.first_key);
    const int64_t last = std::min(task.segment.last_key(i), task.last_key);
    pairs += double(std::max<int64_t>(0, last - first));
  }
  return pairs * double(a.heads_each());
}

struct Weighed {
  Task task;
  double cost;  // multiplications
};

void sort_by_cost(std::vector<Weighed>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Weighed& a, const Weighed& b) { return a.cost > b.cost; });
}

int64_t threads_for(double cost) {
  const double useful = std::max(1.0, cost / kGrain);
  return int64_t(std::min(useful, double(torch::stable::get_num_threads())));
}

// In order: the largest come first, so that no thread ends long after the others.
void run(const std::vector<Weighed>& tasks, int64_t scratch_floats,
         const std::function<void(const Task&, float*)>& body) {
  double cost = 0;
  for (const Weighed& each : tasks) cost += each.cost;
  const int64_t threads = std::min<int64_t>(threads_for(cost), int64_t(tasks.size()));
  if (threads == 0) return;
  const Workspace workspace(threads * scratch_floats * int64_t(sizeof(float)));
  run_tasks(int64_t(tasks.size()), threads, [&](int64_t task, int64_t thread) {
    body(tasks[size_t(task)].task, static_cast<float*>(workspace.data()) + thread * scratch_floats);
  });
}

// Queries [0, all) of each segment and group in pieces, with all their keys.
void cut_queries(const Attention& a, const Task& whole, double products,
                 std::vector<Weighed>& tasks) {
  for (int64_t i = 0; i < whole.last_query; i += a.task_queries()) {
    Task task = whole;
    task.first_query = i;
    task.last_query = std::min(i + a.task_queries(), whole.last_query);
    task.first_key = task.segment.first_key(i, a.window) / Attention::kKeys * Attention::kKeys;
    task.last_key = task.segment.last_key(task.last_query - 1);
    task.writes_keys = false;
    tasks.push_back({task, products * pairs_of(a, task) * double(a.head_dim)});
  }
}

void cut_keys(const Attention& a, const Task& whole, double products, std::vector<Weighed>& tasks) {
  for (int64_t n = 0; n < whole.last_key; n += Attention::kKeys) {
    Task task = whole;
    task.first_key = n;
    task.last_key = std::min(n + Attention::kKeys, whole.last_key);
    task.writes_queries = false;
    tasks.push_back({task, products * pairs_of(a, task) * double(a.head_dim)});
  }
}

std::vector<Weighed> whole_tasks(const Attention& a, const std::vector<Segment>& segments,
                                 double products) {
  std::vector<Weighed> tasks;
  for (const Segment& segment : segments) {
    Task task{segment, 0, 0, segment.num_queries, 0, segment.num_keys, true, true};
    const double cost = products * pairs_of(a, task) * double(a.head_dim);
    for (task.group = 0; task.group < a.num_groups; ++task.group) tasks.push_back({task, cost});
  }
  sort_by_cost(tasks);
  return tasks;
}

// When the last of these tasks ends, if each goes to the thread that is free first.
double time_of(const std::vector<Weighed>& tasks, size_t first, int64_t threads) {
  std::vector<double> busy(static_cast<size_t>(threads), 0.0);
  for (size_t i = first; i < tasks.size(); ++i) {
    *std::min_element(busy.begin(), busy.end()) += tasks[i].cost;
  }
  return *std::max_element(busy.begin(), busy.end());
}

constexpr double kForwardProducts = 2;   // scores, outputs
constexpr double kBackwardProducts = 5;  // scores, their gradients, and those of q, k, v
constexpr double kKeyProducts = 4;       // without the gradient of q
constexpr double kQueryProducts = 3;     // with it alone

// A document's head is cheapest as one task, which computes its scores once. The largest are cut
// in two kinds of smaller ones while that lets all threads end sooner.
std::vector<Weighed> backward_tasks(const Attention& a, const std::vector<Segment>& segments) {
  const std::vector<Weighed> whole = whole_tasks(a, segments, kBackwardProducts);
  double total = 0;
  for (const Weighed& each : whole) total += each.cost;
  const int64_t threads = threads_for(total);
  constexpr double kTwice = (kKeyProducts + kQueryProducts) / kBackwardProducts;
  const auto time_when_cut = [&](size_t count) {
    double work = 0;
    for (size_t i = 0; i < whole.size(); ++i) work += whole[i].cost * (i < count ? kTwice : 1.0);
    return std::max(time_of(whole, count, threads), work / double(threads));
  };
  const auto held = [&](const Weighed& each) {
    return each.task.segment.num_queries * a.heads_each() * a.feature_stride();
  };
  size_t cut = 0;
  while (cut < whole.size() && held(whole[cut]) > kMostHeld) ++cut;
  double best = time_when_cut(cut);
  const size_t most = std::min(whole.size(), cut + size_t(threads));
  for (size_t count = cut + 1; count <= most; ++count) {
    const double time = time_when_cut(count);
    if (time < best) {
      best = time;
      cut = count;
    }
  }
  std::vector<Weighed> tasks(whole.begin() + int64_t(cut), whole.end());
  std::vector<Weighed> pieces;
  for (size_t i = 0; i < cut; ++i) {
    cut_keys(a, whole[i].task, kKeyProducts, pieces);
    cut_queries(a, whole[i].task, kQueryProducts, pieces);
  }
  sort_by_cost(pieces);
  tasks.insert(tasks.end(), pieces.begin(), pieces.end());
  return tasks;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                     double scale, std::optional<int64_t> window,
                                     std::optional<double> softcap) {
  Problems problems("halfbyte::attention");
  std::vector<Segment> segments;
  Attention a =
      check({q, k, v, cu_seqlens_q, cu_seqlens_k, scale, window, softcap}, segments, problems);
  const Rows queries(q), keys(k), values(v);
  const Tensor out = activation(q, {a.num_queries, a.num_heads, a.head_dim});
  const Tensor lse = activation(q, {a.num_heads, a.num_queries}, ScalarType::Float);
  const Rows outputs(out);
  a.q = queries.heads;
  a.k = keys.heads;
  a.v = values.heads;
  a.out = outputs.heads;
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  std::vector<Weighed> tasks;
  for (const Weighed& each : whole_tasks(a, segments, kForwardProducts)) {
    cut_queries(a, each.task, kForwardProducts, tasks);
  }
  sort_by_cost(tasks);
  const Kernels& with = kernels();
  run(tasks, a.forward_scratch(),
      [&](const Task& task, float* scratch) { with.attention_forward(a, task, scratch); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale,
    std::optional<int64_t> window, std::optional<double> softcap) {
  Problems problems("halfbyte::attention_backward");
  std::vector<Segment> segments;
  Attention a =
      check({q, k, v, cu_seqlens_q, cu_seqlens_k, scale, window, softcap}, segments, problems);
  const std::vector<int64_t> shape{a.num_queries, a.num_heads, a.head_dim};
  expect_heads(grad, "grad", q.scalar_type(), shape, problems);
  expect_heads(out, "out", q.scalar_type(), shape, problems);
  problems.expect_vector(lse, "lse", ScalarType::Float, a.num_heads * a.num_queries);
  problems.raise();
  const Rows queries(q), keys(k), values(v), outputs(out), grads(grad);
  const Rows grad_q(activation(q, shape));
  const Rows grad_k(activation(k, {k.size(0), a.num_groups, a.head_dim}));
  const Rows grad_v(activation(v, {k.size(0), a.num_groups, a.head_dim}));
  const Workspace delta(a.num_heads * a.num_queries * int64_t(sizeof(float)));
  a.q = queries.heads;
  a.k = keys.heads;
  a.v = values.heads;
  a.out = outputs.heads;
  a.grad = grads.heads;
  a.grad_q = grad_q.heads;
  a.grad_k = grad_k.heads;
  a.grad_v = grad_v.heads;
  a.lse = static_cast<float*>(lse.data_ptr());
  a.delta = static_cast<float*>(delta.data());
  const Kernels& with = kernels();
  run_range(a.num_queries, kDeltaGrain / (a.num_heads * a.head_dim),
            [&](int64_t b, int64_t e) { with.attention_delta(a, b, e); });
  const std::vector<Weighed> tasks = backward_tasks(a, segments);
  int64_t held = 0;
  for (const Weighed& each : tasks) {
    if (each.task.writes_queries) {
      held = std::max(held, each.task.last_query - each.task.first_query);
    }
  }
  run(tasks, a.backward_scratch(held),
      [&](const Task& task, float* scratch) { with.attention_backward(a, task, scratch); });
  return {grad_q.tensor, grad_k.tensor, grad_v.tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace halfbyte
