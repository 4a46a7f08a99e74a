// Times a given order and counts its memory; see timing.h.

#include "search/problem/timing.h"

#include <algorithm>
#include <cstdint>
#include <optional>
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

// A set of kinds of stages.
constexpr uint8_t Only(StageKind kind) {
  return static_cast<uint8_t>(1 << static_cast<int>(kind));
}
constexpr uint8_t kOnlyForward = Only(StageKind::kForward);
constexpr uint8_t kWholeBackward = kOnlyForward | Only(StageKind::kBackward);
constexpr uint8_t kSplitBackward =
    kOnlyForward | Only(StageKind::kInputGrad) | Only(StageKind::kWeightGrad);

// Which of a pair's stages stand in the order, and when they end.
struct PairState {
  const GraphChoice* choice = nullptr;  // the forward's
  uint64_t forward_end = 0, gradient_end = 0;
  uint8_t present = 0;
  bool forward_done = false, gradient_done = false;
  // Ranks of other pairs have stopped until it is done.
  bool forward_awaited = false, gradient_awaited = false;
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
    inputs_.resize(graph_.ranks);
    // A rank that stops is looked at again when what it waits for is done.
    for (int r = 0; r < graph_.ranks; ++r) {
      runnable_.push_back(r);
      times_.ranks[r].resize(schedule_.ranks[r].size());
    }
    queued_.assign(graph_.ranks, true);
    uint64_t makespan = 0;
    for (size_t i = 0; i < runnable_.size(); ++i) {
      const int r = runnable_[i];
      queued_[r] = false;
      RunRank(r);
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
        if (entry.kind == StageKind::kForward) {
          state.choice = &graph_.choices_of(pair)[entry.choice];
        }
        if ((state.present & Only(entry.kind)) != 0) {
          return wrong("appears twice");
        }
        state.present |= Only(entry.kind);
      }
    }
    for (int p = 0; p < graph_.pairs; ++p) {
      const PairState& state = states_[p];
      bool good = false;
      switch (graph_.mode[p]) {
        case PairMode::kForwardOnly:
          good = state.present == kOnlyForward;
          break;
        case PairMode::kWhole:
          good = state.present == kWholeBackward;
          break;
        case PairMode::kSplit:
          good =
              state.present == kSplitBackward ||
              (state.present == kWholeBackward && state.choice->has_backward());
          break;
      }
      if (!good) {
        std::string scheduled;
        for (const StageKind kind :
             {StageKind::kForward, StageKind::kBackward, StageKind::kInputGrad,
              StageKind::kWeightGrad}) {
          if ((state.present & Only(kind)) != 0) {
            scheduled += StageKindLetter(kind);
          }
        }
        return FieldError(
            absl::StrCat("segment ", graph_.pair_sweep[p], " stage ",
                         graph_.stage_index(p)),
            absl::StrCat(scheduled, " scheduled"),
            "must have an F, and the backward that the problem asks for");
      }
    }
    return absl::OkStatus();
  }

  // The ranks of the pairs at the other ends.
  void Wake(ArrayView<GraphEdge> edges) {
    for (const GraphEdge& edge : edges) {
      const int rank = graph_.pair_rank[edge.pair];
      if (queued_[rank]) continue;
      queued_[rank] = true;
      runnable_.push_back(rank);
    }
  }

  // Inputs that the stage at a rank's position has found so far.
  struct InputsFound {
    int count = 0;
    uint64_t ready = 0;  // when the last of them is there
  };

  // Runs the stages of rank r up to its end or one that misses an input.
  void RunRank(int r) {
    const std::vector<ScheduledStage>& order = schedule_.ranks[r];
    size_t position = position_[r];
    uint64_t free = free_[r];
    for (; position < order.size(); ++position) {
      const StageKind kind = order[position].kind;
      const int pair = PairOf(order[position]);
      const std::optional<uint64_t> ready = ReadyAt(kind, pair, inputs_[r]);
      if (!ready) break;
      inputs_[r] = {};
      const uint64_t start = std::max(free, *ready);
      PairState& state = states_[pair];
      const GraphChoice& choice = *state.choice;
      switch (kind) {
        case StageKind::kForward:
          free = start + static_cast<uint64_t>(choice.forward_ns);
          state.forward_done = true;
          state.forward_end = free;
          if (state.forward_awaited) Wake(graph_.consumers_of(pair));
          break;
        case StageKind::kBackward:
        case StageKind::kInputGrad:
          free = start + static_cast<uint64_t>(kind == StageKind::kBackward
                                                   ? choice.backward_ns
                                                   : choice.input_grad_ns);
          state.gradient_done = true;
          state.gradient_end = free;
          if (state.gradient_awaited) Wake(graph_.producers_of(pair));
          break;
        case StageKind::kWeightGrad:
          free = start + static_cast<uint64_t>(choice.weight_grad_ns);
          break;
      }
      times_.ranks[r][position] = {static_cast<int64_t>(start),
                                   static_cast<int64_t>(free)};
    }
    position_[r] = position;
    free_[r] = free;
  }

  // When a stage's inputs are there; nullopt when one is missing still, which
  // is then marked as awaited. `found` is where to go on.
  std::optional<uint64_t> ReadyAt(StageKind kind, int pair,
                                  InputsFound& found) {
    const PairState& state = states_[pair];
    switch (kind) {
      case StageKind::kForward: {
        const auto producers = graph_.producers_of(pair);
        for (; found.count < producers.size(); ++found.count) {
          const GraphEdge& edge = producers[found.count];
          PairState& producer = states_[edge.pair];
          if (!producer.forward_done) {
            producer.forward_awaited = true;
            return std::nullopt;
          }
          found.ready =
              std::max(found.ready, producer.forward_end +
                                        static_cast<uint64_t>(edge.delay_ns));
        }
        return found.ready;
      }
      case StageKind::kBackward:
      case StageKind::kInputGrad: {
        if (!state.forward_done) return std::nullopt;
        const auto consumers = graph_.consumers_of(pair);
        for (; found.count < consumers.size(); ++found.count) {
          const GraphEdge& edge = consumers[found.count];
          PairState& consumer = states_[edge.pair];
          if (!consumer.gradient_done) {
            consumer.gradient_awaited = true;
            return std::nullopt;
          }
          found.ready =
              std::max(found.ready, consumer.gradient_end +
                                        static_cast<uint64_t>(edge.delay_ns));
        }
        return std::max(found.ready, state.forward_end);
      }
      case StageKind::kWeightGrad:
        if (!state.gradient_done) return std::nullopt;
        return state.gradient_end;
    }
    return std::nullopt;
  }

  const ProblemGraph& graph_;
  const Schedule& schedule_;
  std::vector<PairState> states_;
  StageTimes times_;
  std::vector<size_t> position_;
  std::vector<uint64_t> free_;
  std::vector<InputsFound> inputs_;
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
