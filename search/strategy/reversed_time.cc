// Problems and orders in reversed time; see reversed_time.h.

#include "search/strategy/reversed_time.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {
namespace {

// The headroom is at most this part of any limit: with less, choices that
// rebuild activations cost too much memory, with more, all others.
constexpr int64_t kHeadroomPart = 48;

}  // namespace

std::optional<ProblemGraph> InReversedTime(const ProblemGraph& graph) {
  if (!std::all_of(graph.mode.begin(), graph.mode.end(),
                   [](PairMode mode) { return mode == PairMode::kWhole; })) {
    return std::nullopt;
  }
  const auto extra_bytes = [](const GraphChoice& choice) {
    return std::max<int64_t>(0,
                             choice.backward_bytes - choice.activation_bytes);
  };
  // Pairs on several ranks share choices, and so one headroom.
  int64_t headroom = 0;
  for (const GraphChoice& choice : graph.choices) {
    headroom = std::max(headroom, extra_bytes(choice));
  }
  for (const int rank : graph.pair_rank) {
    headroom = std::min(headroom, graph.limit_bytes[rank] / kHeadroomPart);
  }
  ProblemGraph reversed = graph;
  for (GraphChoice& choice : reversed.choices) {
    std::swap(choice.forward_ns, choice.backward_ns);
    choice.activation_bytes +=
        std::max<int64_t>(0, extra_bytes(choice) - headroom);
    choice.backward_bytes = choice.activation_bytes;
  }
  for (int64_t& limit : reversed.limit_bytes) {
    limit = std::max<int64_t>(0, limit - headroom);
  }
  return reversed;
}

void ReverseTime(TaskOrder& order) {
  std::reverse(order.tasks.begin(), order.tasks.end());
  for (Task& task : order.tasks) {
    task += TaskKind(task) == kForwardTask ? kGradientTask : -kGradientTask;
  }
}

}  // namespace pipeweaver::search
