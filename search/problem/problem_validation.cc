// Checks that a problem is well formed; see problem_validation.h.

#include "search/problem/problem_validation.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "search/problem/field_error.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

// Adds `value` to `sum`; false when the result does not stay below 2^63.
bool Add(int64_t value, int64_t& sum) {
  return !__builtin_add_overflow(sum, value, &sum);
}

class Validator {
 public:
  explicit Validator(const Problem& problem)
      : problem_(problem), rank_bytes_(problem.memory_limit_bytes.size(), 0) {}

  absl::Status Run() {
    PW_RETURN_IF_ERROR(CheckRanks());
    if (problem_.sweeps.empty()) {
      return FieldError("segments", "[]", "must not be empty");
    }
    PW_RETURN_IF_ERROR(CheckIds());
    for (size_t s = 0; s < problem_.sweeps.size(); ++s) {
      PW_RETURN_IF_ERROR(CheckSweep(s));
    }
    return CheckCircles();
  }

 private:
  absl::Status CheckRanks() {
    if (problem_.ranks < 1) {
      return FieldError("ranks", absl::StrCat(problem_.ranks),
                        "must be at least 1");
    }
    if (problem_.memory_limit_bytes.size() !=
        static_cast<size_t>(problem_.ranks)) {
      return FieldError(
          "memory_limit_bytes",
          absl::StrCat("a list of ", problem_.memory_limit_bytes.size()),
          absl::StrCat("must hold one limit for each of the ", problem_.ranks,
                       " ranks"));
    }
    for (size_t r = 0; r < problem_.memory_limit_bytes.size(); ++r) {
      PW_RETURN_IF_ERROR(CheckRange(problem_.memory_limit_bytes[r], [&] {
        return absl::StrCat("memory_limit_bytes[", r, "]");
      }));
    }
    return absl::OkStatus();
  }

  absl::Status CheckIds() {
    absl::flat_hash_map<absl::string_view, size_t> seen;
    for (size_t s = 0; s < problem_.sweeps.size(); ++s) {
      const auto [at, added] = seen.emplace(problem_.sweeps[s].id, s);
      if (!added) {
        return FieldError(absl::StrCat("segments[", s, "].id"),
                          problem_.sweeps[s].id,
                          absl::StrCat("must be unique, stands at segments[",
                                       at->second, "] too"));
      }
    }
    return absl::OkStatus();
  }

  template <typename FieldName>
  absl::Status CheckRange(int64_t value, const FieldName& field) {
    if (value >= 0 && value <= kMostQuantity) return absl::OkStatus();
    return FieldError(field(), absl::StrCat(value),
                      "must be an integer from 0 to 10^18-1");
  }

  template <typename FieldName>
  absl::Status CheckTime(int64_t value, const FieldName& field) {
    PW_RETURN_IF_ERROR(CheckRange(value, field));
    if (Add(value, total_ns_)) return absl::OkStatus();
    return FieldError(
        field(), absl::StrCat(value),
        "the sum of all durations and transfers must stay below 2^63");
  }

  template <typename FieldName>
  absl::Status CheckBytes(int rank, int64_t value, const FieldName& field) {
    PW_RETURN_IF_ERROR(CheckRange(value, field));
    if (Add(value, rank_bytes_[rank])) return absl::OkStatus();
    return FieldError(field(), absl::StrCat(value),
                      absl::StrCat("the sum of all bytes of rank ", rank,
                                   " must stay below 2^63"));
  }

  absl::Status CheckSweep(size_t s) {
    const Sweep& sweep = problem_.sweeps[s];
    const auto field = [s](absl::string_view name) {
      return absl::StrCat("segments[", s, "].", name);
    };
    if (sweep.stages.empty()) {
      return FieldError(field("stages"), "[]", "must not be empty");
    }
    std::vector<int> seen;
    for (const int before : sweep.after) {
      if (before < 0 || static_cast<size_t>(before) >= problem_.sweeps.size()) {
        return FieldError(field("after"), absl::StrCat(before),
                          "must name existing segments");
      }
      const Sweep& producer = problem_.sweeps[before];
      if (producer.backward && !sweep.backward) {
        return FieldError(field("after"), producer.id,
                          "a segment with a backward must not be named by one "
                          "without");
      }
      seen.push_back(before);
    }
    std::sort(seen.begin(), seen.end());
    if (std::adjacent_find(seen.begin(), seen.end()) != seen.end()) {
      return FieldError(field("after"), "a list with repeats",
                        "must name each segment once");
    }
    for (size_t k = 0; k < sweep.stages.size(); ++k) {
      PW_RETURN_IF_ERROR(CheckStage(s, k));
    }
    return absl::OkStatus();
  }

  absl::Status CheckStage(size_t s, size_t k) {
    const Stage& stage = problem_.sweeps[s].stages[k];
    const auto field = [s, k](absl::string_view name) {
      return absl::StrCat("segments[", s, "].stages[", k, "].", name);
    };
    if (stage.rank < 0 || stage.rank >= problem_.ranks) {
      return FieldError(
          field("rank"), absl::StrCat(stage.rank),
          absl::StrCat("must be from 0 to ranks - 1 = ", problem_.ranks - 1));
    }
    PW_RETURN_IF_ERROR(
        CheckTime(stage.transfer_ns, [&] { return field("transfer_ns"); }));
    if (stage.choices.empty()) {
      return FieldError(field("choices"), "[]", "must not be empty");
    }
    for (size_t c = 0; c < stage.choices.size(); ++c) {
      const Choice& choice = stage.choices[c];
      const auto time = [&](int64_t value, absl::string_view name) {
        return CheckTime(value, [&] {
          return field(absl::StrCat("choices[", c, "].", name));
        });
      };
      const auto bytes = [&](int64_t value, absl::string_view name) {
        return CheckBytes(stage.rank, value, [&] {
          return field(absl::StrCat("choices[", c, "].", name));
        });
      };
      PW_RETURN_IF_ERROR(time(choice.forward_ns, "forward_ns"));
      PW_RETURN_IF_ERROR(time(choice.input_grad_ns, "input_grad_ns"));
      PW_RETURN_IF_ERROR(time(choice.weight_grad_ns, "weight_grad_ns"));
      PW_RETURN_IF_ERROR(
          time(choice.fused_backward_ns.value_or(0), "fused_backward_ns"));
      PW_RETURN_IF_ERROR(bytes(choice.activation_bytes, "activation_bytes"));
      PW_RETURN_IF_ERROR(bytes(choice.backward_bytes, "backward_bytes"));
      PW_RETURN_IF_ERROR(bytes(choice.weight_grad_bytes, "weight_grad_bytes"));
      PW_RETURN_IF_ERROR(
          bytes(choice.fused_backward_bytes, "fused_backward_bytes"));
    }
    return absl::OkStatus();
  }

  // Kahn's algorithm over `after`.
  absl::Status CheckCircles() {
    const size_t n = problem_.sweeps.size();
    std::vector<std::vector<int>> consumers(n);
    std::vector<int> waits(n, 0);
    for (size_t s = 0; s < n; ++s) {
      for (const int before : problem_.sweeps[s].after) {
        consumers[before].push_back(static_cast<int>(s));
      }
      waits[s] = static_cast<int>(problem_.sweeps[s].after.size());
    }
    std::vector<int> ready;
    for (size_t s = 0; s < n; ++s) {
      if (waits[s] == 0) ready.push_back(static_cast<int>(s));
    }
    size_t done = 0;
    while (!ready.empty()) {
      const int s = ready.back();
      ready.pop_back();
      ++done;
      for (const int consumer : consumers[s]) {
        if (--waits[consumer] == 0) ready.push_back(consumer);
      }
    }
    if (done == n) return absl::OkStatus();
    size_t s = 0;
    while (waits[s] == 0) ++s;
    return FieldError(absl::StrCat("segments[", s, "].after"),
                      problem_.sweeps[s].id,
                      "segments must not wait for each other in a circle");
  }

  const Problem& problem_;
  int64_t total_ns_ = 0;
  std::vector<int64_t> rank_bytes_;
};

}  // namespace

absl::Status ValidateProblem(const Problem& problem) {
  return Validator(problem).Run();
}

}  // namespace pipeweaver::search
