// The exhaustive oracle; see oracle.h.

#include "search/strategy/testing/oracle.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <vector>

#include "search/problem/problem_graph.h"

namespace pipeweaver::search {
namespace {

// A pair's progress.
enum : int { kNothing = 0, kForwardDone, kInputGradDone, kAllDone };

class Oracle {
 public:
  Oracle(const ProblemGraph& graph, int64_t most_steps)
      : graph_(graph),
        most_steps_(most_steps),
        progress_(graph.pairs, kNothing),
        choice_(graph.pairs, 0),
        fused_(graph.pairs, 0),
        forward_end_(graph.pairs, 0),
        gradient_end_(graph.pairs, 0),
        free_(graph.ranks, 0),
        live_(graph.ranks, 0) {
    // The least work left per pair and progress, for the bound.
    work_.resize(graph.pairs);
    for (int p = 0; p < graph.pairs; ++p) {
      int64_t whole = kUnset, backward = kUnset;
      for (const GraphChoice& c : graph.choices_of(p)) {
        int64_t b = kUnset;
        if (graph.mode[p] == PairMode::kForwardOnly) b = 0;
        if (graph.mode[p] == PairMode::kSplit) {
          b = c.input_grad_ns + c.weight_grad_ns;
        }
        if (c.has_backward()) b = std::min(b, c.backward_ns);
        backward = std::min(backward, b);
        whole = std::min(whole, c.forward_ns + b);
      }
      work_[p] = {whole, backward};
    }
  }

  OracleAnswer Solve() {
    Step(0);
    OracleAnswer answer;
    if (best_ != kUnset) answer.makespan_ns = best_;
    answer.exact = steps_ <= most_steps_;
    return answer;
  }

 private:
  static constexpr int64_t kUnset = std::numeric_limits<int64_t>::max();
  struct Work {
    int64_t whole, backward;
  };

  bool Over() const { return steps_ > most_steps_; }

  int64_t Bound() const {
    std::vector<int64_t> until = free_;
    for (int p = 0; p < graph_.pairs; ++p) {
      int64_t& at = until[graph_.pair_rank[p]];
      if (progress_[p] == kNothing) {
        at += work_[p].whole;
      } else if (progress_[p] == kForwardDone && graph_.has_backward(p)) {
        at += work_[p].backward;
      } else if (progress_[p] == kInputGradDone) {
        at += graph_.choices_of(p)[choice_[p]].weight_grad_ns;
      }
    }
    return *std::max_element(until.begin(), until.end());
  }

  // True when a state seen before was no worse: the same progress and choices,
  // and no time later.
  bool Seen() {
    std::vector<int> key;
    std::vector<int64_t> times = free_;
    for (int p = 0; p < graph_.pairs; ++p) {
      key.push_back(progress_[p]);
      key.push_back(progress_[p] == kNothing || progress_[p] == kAllDone
                        ? 0
                        : choice_[p] * 2 + fused_[p]);
      if (progress_[p] >= kForwardDone) times.push_back(forward_end_[p]);
      if (progress_[p] >= kInputGradDone) times.push_back(gradient_end_[p]);
    }
    std::vector<std::vector<int64_t>>& known = seen_[key];
    for (const std::vector<int64_t>& other : known) {
      bool no_worse = true;
      for (size_t i = 0; i < times.size() && no_worse; ++i) {
        no_worse = other[i] <= times[i];
      }
      if (no_worse) return true;
    }
    if (known.size() < 64) known.push_back(times);
    return false;
  }

  void Step(int64_t makespan) {
    if (++steps_ > most_steps_) return;
    if (std::max(makespan, Bound()) >= best_) return;
    bool done = true;
    for (int p = 0; p < graph_.pairs; ++p) {
      done =
          done && (progress_[p] == kAllDone ||
                   (progress_[p] == kForwardDone && !graph_.has_backward(p)));
    }
    if (done) {
      best_ = makespan;
      return;
    }
    if (Seen()) return;
    for (int p = 0; p < graph_.pairs && !Over(); ++p) {
      if (progress_[p] == kNothing) {
        StartForward(p, makespan);
      } else if (progress_[p] == kForwardDone && graph_.has_backward(p)) {
        StartGradient(p, makespan);
      } else if (progress_[p] == kInputGradDone) {
        StartWeightGrad(p, makespan);
      }
    }
  }

  void StartForward(int p, int64_t makespan) {
    const int r = graph_.pair_rank[p];
    int64_t start = free_[r];
    for (const GraphEdge& edge : graph_.producers_of(p)) {
      if (progress_[edge.pair] == kNothing) return;
      start = std::max(start, forward_end_[edge.pair] + edge.delay_ns);
    }
    const auto choices = graph_.choices_of(p);
    const int64_t old_free = free_[r];
    for (int c = 0; c < choices.size() && !Over(); ++c) {
      const int64_t bytes = choices[c].activation_bytes;
      if (live_[r] + bytes > graph_.limit_bytes[r]) continue;
      choice_[p] = c;
      progress_[p] = kForwardDone;
      forward_end_[p] = free_[r] = start + choices[c].forward_ns;
      if (graph_.has_backward(p)) live_[r] += bytes;
      Step(std::max(makespan, free_[r]));
      if (graph_.has_backward(p)) live_[r] -= bytes;
      free_[r] = old_free;
      progress_[p] = kNothing;
    }
  }

  void StartGradient(int p, int64_t makespan) {
    const int r = graph_.pair_rank[p];
    int64_t start = std::max(free_[r], forward_end_[p]);
    for (const GraphEdge& edge : graph_.consumers_of(p)) {
      if (progress_[edge.pair] < kInputGradDone) return;
      start = std::max(start, gradient_end_[edge.pair] + edge.delay_ns);
    }
    const GraphChoice& choice = graph_.choices_of(p)[choice_[p]];
    const int64_t old_free = free_[r], old_live = live_[r];
    const int64_t others = old_live - choice.activation_bytes;
    const auto run = [&](int64_t length, int64_t peak, int64_t after, int to,
                         int fused) {
      if (others + std::max(peak, after) > graph_.limit_bytes[r]) return;
      progress_[p] = to;
      fused_[p] = fused;
      live_[r] = others + after;
      gradient_end_[p] = free_[r] = start + length;
      Step(std::max(makespan, free_[r]));
      free_[r] = old_free;
      live_[r] = old_live;
      fused_[p] = 0;
      progress_[p] = kForwardDone;
    };
    if (graph_.mode[p] == PairMode::kWhole || choice.has_backward()) {
      run(choice.backward_ns, choice.backward_bytes, 0, kAllDone, 1);
    }
    if (graph_.mode[p] == PairMode::kSplit) {
      run(choice.input_grad_ns, choice.input_grad_bytes,
          choice.weight_grad_bytes, kInputGradDone, 0);
    }
  }

  void StartWeightGrad(int p, int64_t makespan) {
    const int r = graph_.pair_rank[p];
    const GraphChoice& choice = graph_.choices_of(p)[choice_[p]];
    const int64_t old_free = free_[r];
    progress_[p] = kAllDone;
    live_[r] -= choice.weight_grad_bytes;
    free_[r] = std::max(free_[r], gradient_end_[p]) + choice.weight_grad_ns;
    Step(std::max(makespan, free_[r]));
    free_[r] = old_free;
    live_[r] += choice.weight_grad_bytes;
    progress_[p] = kInputGradDone;
  }

  const ProblemGraph& graph_;
  const int64_t most_steps_;
  int64_t steps_ = 0;
  int64_t best_ = kUnset;
  std::vector<int> progress_, choice_, fused_;
  std::vector<int64_t> forward_end_, gradient_end_, free_, live_;
  std::vector<Work> work_;
  std::map<std::vector<int>, std::vector<std::vector<int64_t>>> seen_;
};

}  // namespace

OracleAnswer SolveExhaustively(const ProblemGraph& graph, int64_t most_steps) {
  return Oracle(graph, most_steps).Solve();
}

}  // namespace pipeweaver::search
