// Measured 1F1B pipeline steps.

#include "profiler/pipeline_timings.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "semu/base/status_macros.h"

namespace pipeweaver::profiler {
namespace {

// A step of eleven days: nothing summed from such times leaves int64.
constexpr double kMaxMilliseconds = 1e9;

absl::StatusOr<std::vector<int64_t>> ReadTimes(const nlohmann::json& iteration,
                                               const char* field) {
  const auto found = iteration.find(field);
  if (found == iteration.end() || !found->is_array()) {
    return absl::InvalidArgumentError(absl::StrCat(field, " is no list"));
  }
  std::vector<int64_t> times_ns;
  for (const nlohmann::json& value : *found) {
    const double ms = value.is_number() ? value.get<double>() : -1;
    if (!(ms >= 0 && ms <= kMaxMilliseconds)) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, "[", times_ns.size(),
                       "] must be milliseconds from 0 to ", kMaxMilliseconds));
    }
    times_ns.push_back(std::llround(ms * 1e6));
  }
  return times_ns;
}

absl::StatusOr<std::vector<StageInterval>> ReadIntervals(
    const nlohmann::json& iteration, const char* start_field,
    const char* end_field) {
  PW_ASSIGN_OR_RETURN(const std::vector<int64_t> starts,
                      ReadTimes(iteration, start_field));
  PW_ASSIGN_OR_RETURN(const std::vector<int64_t> ends,
                      ReadTimes(iteration, end_field));
  if (starts.size() != ends.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(start_field, " has ", starts.size(), " entries, ",
                     end_field, " ", ends.size()));
  }
  std::vector<StageInterval> intervals;
  for (std::size_t i = 0; i < starts.size(); ++i) {
    if (ends[i] < starts[i]) {
      return absl::InvalidArgumentError(absl::StrCat(
          end_field, "[", i, "] is before ", start_field, "[", i, "]"));
    }
    intervals.push_back({starts[i], ends[i]});
  }
  return intervals;
}

absl::StatusOr<RankIteration> ReadIteration(const nlohmann::json& iteration) {
  if (!iteration.is_object()) return absl::InvalidArgumentError("is no object");
  RankIteration result;
  PW_ASSIGN_OR_RETURN(result.forwards,
                      ReadIntervals(iteration, "fwd_start", "fwd_end"));
  PW_ASSIGN_OR_RETURN(result.backwards,
                      ReadIntervals(iteration, "bwd_start", "bwd_end"));
  if (result.forwards.empty() ||
      result.forwards.size() != result.backwards.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        result.forwards.size(), " forwards, ", result.backwards.size(),
        " backwards; there must be as many of each, and one at least"));
  }
  return result;
}

absl::Status CheckRange(const PipelineTimings& timings, int64_t first,
                        int64_t last) {
  if (first > last)
    return absl::InvalidArgumentError("the range of iterations is empty");
  for (int64_t i = first; i <= last; ++i) {
    if (!timings.contains(i)) {
      return absl::InvalidArgumentError(
          absl::StrCat("iteration ", i, " is missing"));
    }
  }
  return absl::OkStatus();
}

int64_t Median(std::vector<int64_t> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1
             ? values[middle]
             : values[middle - 1] + (values[middle] - values[middle - 1]) / 2;
}

}  // namespace

absl::StatusOr<PipelineTimings> ParsePipelineTimings(
    const std::vector<std::string>& rank_json) {
  PipelineTimings timings;
  for (std::size_t rank = 0; rank < rank_json.size(); ++rank) {
    const nlohmann::json document =
        nlohmann::json::parse(rank_json[rank], nullptr, false);
    if (!document.is_object()) {
      return absl::InvalidArgumentError(
          absl::StrCat("rank ", rank, ": no JSON object"));
    }
    for (const auto& [key, value] : document.items()) {
      int64_t number = 0;
      if (!absl::SimpleAtoi(key, &number)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "rank ", rank, ": iteration '", key, "' is no integer"));
      }
      absl::StatusOr<RankIteration> iteration = ReadIteration(value);
      if (!iteration.ok()) {
        return absl::InvalidArgumentError(
            absl::StrCat("rank ", rank, ", iteration ", number, ": ",
                         iteration.status().message()));
      }
      std::vector<RankIteration>& ranks = timings[number];
      if (ranks.size() != rank ||
          (rank > 0 &&
           ranks[0].forwards.size() != iteration->forwards.size())) {
        return absl::InvalidArgumentError(absl::StrCat(
            "rank ", rank, ", iteration ", number,
            ": every rank must have it, with as many microbatches as rank 0"));
      }
      ranks.push_back(*std::move(iteration));
    }
  }
  for (const auto& [number, ranks] : timings) {
    if (ranks.size() != rank_json.size()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "iteration ", number, " is missing on rank ", ranks.size()));
    }
  }
  if (timings.empty()) return absl::InvalidArgumentError("no iterations");
  return timings;
}

int64_t MeasuredMakespanNs(const std::vector<RankIteration>& iteration) {
  int64_t first = INT64_MAX;
  int64_t last = INT64_MIN;
  for (const RankIteration& rank : iteration) {
    for (const auto* stages : {&rank.forwards, &rank.backwards}) {
      for (const StageInterval& stage : *stages) {
        first = std::min(first, stage.start_ns);
        last = std::max(last, stage.end_ns);
      }
    }
  }
  return last - first;
}

StageDurations DurationsOf(const std::vector<RankIteration>& iteration) {
  StageDurations durations;
  for (const RankIteration& rank : iteration) {
    const auto lengths = [](const std::vector<StageInterval>& stages) {
      std::vector<int64_t> result;
      result.reserve(stages.size());
      for (const StageInterval& stage : stages) {
        result.push_back(stage.end_ns - stage.start_ns);
      }
      return result;
    };
    durations.forward_ns.push_back(lengths(rank.forwards));
    durations.backward_ns.push_back(lengths(rank.backwards));
  }
  return durations;
}

absl::StatusOr<StageDurations> MedianDurations(const PipelineTimings& timings,
                                               int64_t first, int64_t last) {
  PW_RETURN_IF_ERROR(CheckRange(timings, first, last));
  std::vector<StageDurations> all;
  for (int64_t i = first; i <= last; ++i) {
    all.push_back(DurationsOf(timings.at(i)));
    if (all.back().forward_ns[0].size() != all[0].forward_ns[0].size()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "iteration ", i, " has another number of microbatches than ", first));
    }
  }
  StageDurations median = all[0];
  for (const auto direction :
       {&StageDurations::forward_ns, &StageDurations::backward_ns}) {
    for (std::size_t rank = 0; rank < (median.*direction).size(); ++rank) {
      for (std::size_t m = 0; m < (median.*direction)[rank].size(); ++m) {
        std::vector<int64_t> values;
        values.reserve(all.size());
        for (const StageDurations& one : all) {
          values.push_back((one.*direction)[rank][m]);
        }
        (median.*direction)[rank][m] = Median(std::move(values));
      }
    }
  }
  return median;
}

int64_t OneForwardOneBackwardNs(const StageDurations& durations,
                                int64_t hop_ns) {
  const int ranks = static_cast<int>(durations.forward_ns.size());
  const int microbatches = static_cast<int>(durations.forward_ns[0].size());
  constexpr int64_t kNotYet = -1;
  using Ends = std::vector<std::vector<int64_t>>;
  Ends forward_end(ranks, std::vector<int64_t>(microbatches, kNotYet));
  Ends backward_end = forward_end;
  std::vector<int64_t> free_at(ranks, 0);
  std::vector<int> next_forward(ranks, 0);
  std::vector<int> next_backward(ranks, 0);

  // Advances a rank by one stage if what it waits for has ended.
  const auto advance = [&](int rank) {
    const int warm_up = std::min(ranks - 1 - rank, microbatches);
    const int forwards = next_forward[rank];
    const int backwards = next_backward[rank];
    const bool forward =
        forwards < microbatches && forwards <= backwards + warm_up;
    int& next = forward ? next_forward[rank] : next_backward[rank];
    if (next == microbatches) return false;
    const int neighbour = forward ? rank - 1 : rank + 1;
    int64_t start = free_at[rank];
    if (neighbour >= 0 && neighbour < ranks) {
      const int64_t arrived =
          (forward ? forward_end : backward_end)[neighbour][next];
      if (arrived == kNotYet) return false;
      start = std::max(start, arrived + hop_ns);
    }
    const auto& lengths =
        forward ? durations.forward_ns : durations.backward_ns;
    free_at[rank] = start + lengths[rank][next];
    (forward ? forward_end : backward_end)[rank][next] = free_at[rank];
    ++next;
    return true;
  };
  for (bool progress = true; progress;) {
    progress = false;
    for (int rank = 0; rank < ranks; ++rank) {
      while (advance(rank)) progress = true;
    }
  }
  return *std::max_element(free_at.begin(), free_at.end());
}

absl::StatusOr<int64_t> FitHopNs(const PipelineTimings& timings, int64_t first,
                                 int64_t last) {
  PW_RETURN_IF_ERROR(CheckRange(timings, first, last));
  std::vector<std::pair<StageDurations, int64_t>> steps;
  int64_t largest_makespan_ns = 0;
  for (int64_t i = first; i <= last; ++i) {
    const std::vector<RankIteration>& iteration = timings.at(i);
    steps.emplace_back(DurationsOf(iteration), MeasuredMakespanNs(iteration));
    largest_makespan_ns = std::max(largest_makespan_ns, steps.back().second);
  }
  const auto error_ns = [&steps](int64_t hop_ns) {
    int64_t sum = 0;
    for (const auto& [durations, makespan_ns] : steps) {
      sum += std::abs(OneForwardOneBackwardNs(durations, hop_ns) - makespan_ns);
    }
    return sum;
  };
  // The simulated makespan is convex in the hop (a maximum of sums), but
  // |error| of several steps need not be: scan coarsely, then close in on the
  // best.
  constexpr int64_t kMicrosecond = 1000;
  int64_t best = 0;
  int64_t best_error = error_ns(0);
  for (int64_t step = std::max(largest_makespan_ns / 64, kMicrosecond);;
       step = std::max(step / 8, kMicrosecond)) {
    const int64_t centre = best;
    for (int64_t i = -8; i <= 8; ++i) {
      const int64_t hop = (centre + i * step) / kMicrosecond * kMicrosecond;
      if (hop < 0) continue;
      if (const int64_t error = error_ns(hop); error < best_error) {
        best = hop;
        best_error = error;
      }
    }
    if (step == kMicrosecond) return best;
  }
}

}  // namespace pipeweaver::profiler
