// Times a given order and counts its memory; see timing.h.

#include "search/problem/timing.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "search/problem/field_error.h"
#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

// Where a pair's stages stand in the order, and when they end.
struct PairState {
  int choice = 0;
  bool has_forward = false, has_backward = false;
  bool has_input_grad = false, has_weight_grad = false;
  bool forward_done = false, gradient_done = false;
  uint64_t forward_end = 0, gradient_end = 0;
};

std::string StageName(const ProblemGraph& graph, const ScheduledStage& entry) {
  const char letter[] = {StageKindLetter(entry.kind), '\0'};
  return absl::StrCat(
      letter, " of segment ", entry.sweep, " stage ", entry.stage, " on rank ",
      graph.pair_rank[graph.sweep_first_pair[entry.sweep] + entry.stage]);
}

class Timer {
 public:
  Timer(const ProblemGraph& graph, const Schedule& schedule)
      : graph_(graph), schedule_(schedule), states_(graph.pairs) {}

  absl::StatusOr<StageTimes> Run() {
    PW_RETURN_IF_ERROR(CheckComplete());
    times_.ranks.resize(graph_.ranks);
    position_.assign(graph_.ranks, 0);
    free_.assign(graph_.ranks, 0);
    // A rank is looked at again whenever a pair that it may wait for moves on.
    for (int r = 0; r < graph_.ranks; ++r) {
      runnable_.push_back(r);
      times_.ranks[r].reserve(schedule_.ranks[r].size());
    }
    queued_.assign(graph_.ranks, true);
    uint64_t makespan = 0;
    for (size_t i = 0; i < runnable_.size(); ++i) {
      const int r = runnable_[i];
      queued_[r] = false;
      while (position_[r] < schedule_.ranks[r].size() && Advance(r)) {
      }
      makespan = std::max(makespan, free_[r]);
    }
    for (int r = 0; r < graph_.ranks; ++r) {
      if (position_[r] < schedule_.ranks[r].size()) {
        return FieldError(absl::StrCat("ranks[", r, "][", position_[r], "]"),
                          StageName(graph_, schedule_.ranks[r][position_[r]]),
                          "deadlock: the ranks wait for each other here");
      }
    }
    times_.makespan_ns = static_cast<int64_t>(makespan);
    return std::move(times_);
  }

 private:
  int PairOf(const ScheduledStage& entry) const {
    return graph_.sweep_first_pair[entry.sweep] + entry.stage;
  }

  absl::Status CheckComplete() {
    if (schedule_.ranks.size() != static_cast<size_t>(graph_.ranks)) {
      return FieldError(
          "ranks", absl::StrCat(schedule_.ranks.size(), " lists"),
          absl::StrCat("one list for each of the ", graph_.ranks, " ranks"));
    }
    for (int r = 0; r < graph_.ranks; ++r) {
      for (size_t i = 0; i < schedule_.ranks[r].size(); ++i) {
        const ScheduledStage& entry = schedule_.ranks[r][i];
        const auto wrong = [&](absl::string_view rule) {
          return FieldError(absl::StrCat("ranks[", r, "][", i, "]"),
                            StageName(graph_, entry), rule);
        };
        if (entry.sweep < 0 || entry.sweep >= graph_.sweeps ||
            entry.stage < 0 ||
            entry.stage >= graph_.sweep_first_pair[entry.sweep + 1] -
                               graph_.sweep_first_pair[entry.sweep]) {
          return FieldError(
              absl::StrCat("ranks[", r, "][", i, "]"),
              absl::StrCat("segment ", entry.sweep, " stage ", entry.stage),
              "must be a stage of the problem");
        }
        const int pair = PairOf(entry);
        if (graph_.pair_rank[pair] != r) {
          return wrong(absl::StrCat("stands in the list of rank ", r));
        }
        PairState& state = states_[pair];
        if (entry.choice < 0 ||
            entry.choice >= graph_.choices_of(pair).size()) {
          return wrong(
              absl::StrCat("choice ", entry.choice, " does not exist"));
        }
        bool* present = nullptr;
        switch (entry.kind) {
          case StageKind::kForward:
            present = &state.has_forward;
            state.choice = entry.choice;
            break;
          case StageKind::kBackward:
            present = &state.has_backward;
            break;
          case StageKind::kInputGrad:
            present = &state.has_input_grad;
            break;
          case StageKind::kWeightGrad:
            present = &state.has_weight_grad;
            break;
        }
        if (*present) return wrong("appears twice");
        *present = true;
      }
    }
    for (int p = 0; p < graph_.pairs; ++p) {
      const PairState& state = states_[p];
      const GraphChoice& choice = graph_.choices_of(p)[state.choice];
      bool good = state.has_forward;
      const bool only_b =
          state.has_backward && !state.has_input_grad && !state.has_weight_grad;
      const bool both =
          !state.has_backward && state.has_input_grad && state.has_weight_grad;
      const bool none = !state.has_backward && !state.has_input_grad &&
                        !state.has_weight_grad;
      switch (graph_.mode[p]) {
        case PairMode::kForwardOnly:
          good = good && none;
          break;
        case PairMode::kWhole:
          good = good && only_b;
          break;
        case PairMode::kSplit:
          good = good && (both || (only_b && choice.has_backward()));
          break;
      }
      if (!good) {
        return FieldError(
            absl::StrCat("segment ", graph_.pair_sweep[p], " stage ",
                         graph_.stage_index(p)),
            absl::StrCat(state.has_forward ? "F" : "",
                         state.has_backward ? "B" : "",
                         state.has_input_grad ? "I" : "",
                         state.has_weight_grad ? "W" : "", " scheduled"),
            "must have an F, and the backward that the problem asks for");
      }
    }
    return absl::OkStatus();
  }

  void Wake(int rank) {
    if (queued_[rank]) return;
    queued_[rank] = true;
    runnable_.push_back(rank);
  }

  // Runs the next stage of rank r; false when an input is missing still.
  bool Advance(int r) {
    const ScheduledStage& entry = schedule_.ranks[r][position_[r]];
    const int pair = PairOf(entry);
    PairState& state = states_[pair];
    const GraphChoice& choice = graph_.choices_of(pair)[state.choice];
    uint64_t start = free_[r];
    int64_t length = 0;
    switch (entry.kind) {
      case StageKind::kForward:
        for (const GraphEdge& edge : graph_.producers_of(pair)) {
          if (!states_[edge.pair].forward_done) return false;
          start = std::max(start, states_[edge.pair].forward_end +
                                      static_cast<uint64_t>(edge.delay_ns));
        }
        length = choice.forward_ns;
        break;
      case StageKind::kBackward:
      case StageKind::kInputGrad:
        if (!state.forward_done) return false;
        start = std::max(start, state.forward_end);
        for (const GraphEdge& edge : graph_.consumers_of(pair)) {
          if (!states_[edge.pair].gradient_done) return false;
          start = std::max(start, states_[edge.pair].gradient_end +
                                      static_cast<uint64_t>(edge.delay_ns));
        }
        length = entry.kind == StageKind::kBackward ? choice.backward_ns
                                                    : choice.input_grad_ns;
        break;
      case StageKind::kWeightGrad:
        if (!state.gradient_done) return false;
        start = std::max(start, state.gradient_end);
        length = choice.weight_grad_ns;
        break;
    }
    const uint64_t end = start + static_cast<uint64_t>(length);
    if (entry.kind == StageKind::kForward) {
      state.forward_done = true;
      state.forward_end = end;
      for (const GraphEdge& edge : graph_.consumers_of(pair)) {
        Wake(graph_.pair_rank[edge.pair]);
      }
    } else if (entry.kind != StageKind::kWeightGrad) {
      state.gradient_done = true;
      state.gradient_end = end;
      for (const GraphEdge& edge : graph_.producers_of(pair)) {
        Wake(graph_.pair_rank[edge.pair]);
      }
    }
    free_[r] = end;
    ++position_[r];
    times_.ranks[r].push_back(
        {static_cast<int64_t>(start), static_cast<int64_t>(end)});
    return true;
  }

  const ProblemGraph& graph_;
  const Schedule& schedule_;
  std::vector<PairState> states_;
  StageTimes times_;
  std::vector<size_t> position_;
  std::vector<uint64_t> free_;
  std::vector<int> runnable_;
  std::vector<bool> queued_;
};

}  // namespace

absl::StatusOr<StageTimes> TimeSchedule(const ProblemGraph& graph,
                                        const Schedule& schedule) {
  return Timer(graph, schedule).Run();
}

std::vector<int64_t> PeakBytes(const ProblemGraph& graph,
                               const Schedule& schedule) {
  std::vector<int> chosen(graph.pairs, 0);
  for (const auto& row : schedule.ranks) {
    for (const ScheduledStage& entry : row) {
      if (entry.kind == StageKind::kForward) {
        chosen[graph.sweep_first_pair[entry.sweep] + entry.stage] =
            entry.choice;
      }
    }
  }
  std::vector<int64_t> peaks(graph.ranks, 0);
  for (int r = 0; r < graph.ranks; ++r) {
    int64_t live = 0;
    for (const ScheduledStage& entry : schedule.ranks[r]) {
      const int pair = graph.sweep_first_pair[entry.sweep] + entry.stage;
      const GraphChoice& choice = graph.choices_of(pair)[chosen[pair]];
      switch (entry.kind) {
        case StageKind::kForward:
          live += choice.activation_bytes;
          peaks[r] = std::max(peaks[r], live);
          if (!graph.has_backward(pair)) live -= choice.activation_bytes;
          break;
        case StageKind::kBackward:
          live -= choice.activation_bytes;
          peaks[r] = std::max(peaks[r], live + choice.backward_bytes);
          break;
        case StageKind::kInputGrad:
          live -= choice.activation_bytes;
          peaks[r] = std::max(peaks[r], live + choice.input_grad_bytes);
          live += choice.weight_grad_bytes;
          peaks[r] = std::max(peaks[r], live);
          break;
        case StageKind::kWeightGrad:
          live -= choice.weight_grad_bytes;
          break;
      }
    }
  }
  return peaks;
}

absl::Status CheckMemory(const ProblemGraph& graph, const Schedule& schedule) {
  const std::vector<int64_t> peaks = PeakBytes(graph, schedule);
  for (int r = 0; r < graph.ranks; ++r) {
    if (peaks[r] > graph.limit_bytes[r]) {
      return absl::ResourceExhaustedError(
          absl::StrCat("rank ", r, " holds ", peaks[r],
                       " bytes, over its limit of ", graph.limit_bytes[r]));
    }
  }
  return absl::OkStatus();
}

}  // namespace pipeweaver::search
