#include "search/lower/coverage_checker.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace pipeweaver::search {
namespace {

constexpr int kNone = -1;

absl::Status Violation(absl::string_view what) {
  return absl::FailedPreconditionError(absl::StrCat("coverage: ", what));
}

// [module]: something trainable stands in it or upstream.
std::vector<bool> NeedBackward(const semu::Job& job) {
  std::vector<bool> need;
  for (const semu::Module& module : job.modules) need.push_back(!module.frozen);
  // As often as the longest path has edges.
  for (size_t i = 1; i < job.modules.size(); ++i) {
    for (const semu::ModuleEdge& edge : job.edges) {
      if (need[edge.producer]) need[edge.consumer] = true;
    }
  }
  return need;
}

class Coverage {
 public:
  Coverage(const semu::Job& job, const semu::Batch& batch,
           const StepProblem& step)
      : job_(job), batch_(batch), step_(step) {}

  absl::Status Run() {
    if (absl::Status status = CheckItems(); !status.ok()) return status;
    if (absl::Status status = CheckEmpty(); !status.ok()) return status;
    if (absl::Status status = CheckSweeps(); !status.ok()) return status;
    return CheckUses();
  }

 private:
  static std::string Where(size_t microbatch, int module) {
    return absl::StrCat("microbatch ", microbatch, ", module ", module);
  }

  absl::Status CheckItems() {
    for (const semu::Microbatch& microbatch : batch_.microbatches) {
      auto& modules = holder_.emplace_back();
      for (const auto& items : microbatch.item_tokens) {
        modules.emplace_back(items.size(), kNone);
      }
    }
    for (size_t s = 0; s < step_.sub_microbatches.size(); ++s) {
      const SubMicrobatch& sub = step_.sub_microbatches[s];
      if (sub.microbatch < 0 ||
          sub.microbatch >= static_cast<int>(holder_.size()) ||
          sub.module < 0 ||
          sub.module >= static_cast<int>(job_.modules.size())) {
        return Violation(absl::StrCat(
            "sub-microbatch ", s, " is of ", "microbatch ", sub.microbatch,
            ", module ", sub.module, ", which are not there"));
      }
      std::vector<int>& holder = holder_[sub.microbatch][sub.module];
      for (const int item : sub.items) {
        if (item < 0 || item >= static_cast<int>(holder.size())) {
          return Violation(absl::StrCat(Where(sub.microbatch, sub.module),
                                        " has no item ", item));
        }
        if (holder[item] != kNone) {
          return Violation(absl::StrCat(Where(sub.microbatch, sub.module),
                                        ": item ", item,
                                        " is in two sub-microbatches"));
        }
        holder[item] = static_cast<int>(s);
      }
    }
    for (size_t b = 0; b < holder_.size(); ++b) {
      for (size_t m = 0; m < holder_[b].size(); ++m) {
        const std::vector<int>& holder = holder_[b][m];
        const auto missing = std::find(holder.begin(), holder.end(), kNone);
        if (missing == holder.end()) continue;
        return Violation(absl::StrCat(Where(b, static_cast<int>(m)), ": item ",
                                      missing - holder.begin(),
                                      " is in no sub-microbatch"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckEmpty() const {
    std::vector<std::pair<int, int>> listed = step_.empty;
    std::sort(listed.begin(), listed.end());
    size_t next = 0;
    for (size_t b = 0; b < holder_.size(); ++b) {
      for (size_t m = 0; m < holder_[b].size(); ++m) {
        const std::pair pair(static_cast<int>(b), static_cast<int>(m));
        const bool is_listed = next < listed.size() && listed[next] == pair;
        if (is_listed) ++next;
        if (is_listed == holder_[b][m].empty()) continue;
        return Violation(absl::StrCat(Where(b, pair.second),
                                      is_listed
                                          ? " is listed as empty, but has "
                                          : " is not listed as empty, and ",
                                      is_listed ? "items" : "has no items"));
      }
    }
    if (next == listed.size()) return absl::OkStatus();
    return Violation(absl::StrCat(
        Where(listed[next].first, listed[next].second),
        " is listed as empty, and is not there or is listed twice"));
  }

  // Whether sweep `s` waits for sweep `producer`.
  bool Waits(int s, int producer) const {
    const auto& after = step_.problem.sweeps[s].after;
    return std::find(after.begin(), after.end(), producer) != after.end();
  }

  absl::Status CheckSweeps() {
    const std::vector<bool> need_backward = NeedBackward(job_);
    sweeps_.resize(step_.sub_microbatches.size());
    for (size_t sub = 0; sub < sweeps_.size(); ++sub) {
      const int module = step_.sub_microbatches[sub].module;
      sweeps_[sub].assign(step_.choices[module].size(), kNone);
    }
    for (size_t s = 0; s < step_.problem.sweeps.size(); ++s) {
      const SweepOrigin& origin = step_.sweeps[s];
      const Sweep& sweep = step_.problem.sweeps[s];
      const int module = step_.sub_microbatches[origin.sub_microbatch].module;
      std::vector<int>& segments = sweeps_[origin.sub_microbatch];
      if (origin.segment < 0 ||
          origin.segment >= static_cast<int>(segments.size()) ||
          segments[origin.segment] != kNone) {
        return Violation(absl::StrCat(sweep.id, ": segment ", origin.segment,
                                      " is not there or runs twice"));
      }
      segments[origin.segment] = static_cast<int>(s);
      const bool backward = need_backward[module] && !batch_.forward_only;
      if (sweep.backward != backward) {
        return Violation(absl::StrCat(
            sweep.id, backward ? " has no backward" : " has a backward"));
      }
    }
    for (const std::vector<int>& segments : sweeps_) {
      for (size_t k = 0; k < segments.size(); ++k) {
        if (segments[k] == kNone) {
          return Violation(absl::StrCat(
              "a sub-microbatch does not run segment ", k, " of its module"));
        }
        if (k > 0 && !Waits(segments[k], segments[k - 1])) {
          return Violation(
              absl::StrCat(step_.problem.sweeps[segments[k]].id,
                           " does not wait for the segment before it"));
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckUses() const {
    for (size_t b = 0; b < holder_.size(); ++b) {
      for (size_t e = 0; e < job_.edges.size(); ++e) {
        const semu::ModuleEdge& edge = job_.edges[e];
        for (const semu::ItemUse& use : batch_.microbatches[b].uses[e]) {
          const int producer =
              sweeps_[holder_[b][edge.producer][use.producer_item]].back();
          const int consumer =
              sweeps_[holder_[b][edge.consumer][use.consumer_item]].front();
          if (Waits(consumer, producer)) continue;
          return Violation(absl::StrCat(
              step_.problem.sweeps[consumer].id, " does not wait for ",
              step_.problem.sweeps[producer].id, ", whose item ",
              use.producer_item, " its item ", use.consumer_item, " consumes"));
        }
      }
    }
    return absl::OkStatus();
  }

  const semu::Job& job_;
  const semu::Batch& batch_;
  const StepProblem& step_;
  // [microbatch][module][item]: its sub-microbatch.
  std::vector<std::vector<std::vector<int>>> holder_;
  std::vector<std::vector<int>> sweeps_;  // [sub-microbatch][segment]
};

}  // namespace

absl::Status CheckCoverage(const semu::Job& job, const semu::Batch& batch,
                           const StepProblem& step) {
  return Coverage(job, batch, step).Run();
}

}  // namespace pipeweaver::search
