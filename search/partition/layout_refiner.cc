// Steepest descent, one module at a time, over shapes that are evaluated
// together.

#include "search/partition/layout_refiner.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "search/partition/memory_plan.h"
#include "search/partition/step_problem_builder.h"
#include "search/strategy/worker_pool.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

using semu::Job;

// Of a makespan: what is worth a change.
constexpr double kWorthwhile = 0.999;
// Of the best layout's makespan, beyond RefineOptions::no_worse: a layout that
// takes more on the first samples is not evaluated on the others.
constexpr double kMayMakeGood = 0.006;
// A batch with more stage pairs, and more than by the paper's layout, is not
// searched far in the time that a step's planning has.
constexpr int64_t kManyPairs = 12'000;
// The shapes that it starts from, which no limit leaves out.
constexpr size_t kStarts = 2;

bool AtMost(int64_t ns, double share, int64_t of_ns) {
  return static_cast<double>(ns) <= share * static_cast<double>(of_ns);
}

absl::Status WasCancelled() {
  return absl::CancelledError("the search for a layout was cancelled");
}

// A shape that was looked at.
struct Trial {
  LayoutShape shape;
  absl::Status status;
  // After each sample that was evaluated: the sum of makespans so far.
  std::vector<int64_t> sums_ns;
  std::vector<int64_t> sample_stages;  // [sample]
  int64_t stages = 0;                  // of all of them
  bool complete = false;

  int64_t makespan_ns() const { return sums_ns.back(); }
};

class Refiner {
 public:
  Refiner(const Job& job, const semu::CostModel& costs,
          absl::Span<const semu::Batch> samples, const StepEvaluator& evaluator,
          const RefineOptions& options)
      : job_(job),
        costs_(costs),
        samples_(samples),
        evaluator_(evaluator),
        options_(options),
        pool_(options.threads) {}

  absl::StatusOr<RefinedLayout> Run(absl::Span<const semu::Batch> held_out) {
    semu::Batch all;
    for (const semu::Batch& batch : samples_) {
      all.microbatches.insert(all.microbatches.end(),
                              batch.microbatches.begin(),
                              batch.microbatches.end());
    }
    PW_ASSIGN_OR_RETURN(times_, MeanLayerTimes(job_, all, costs_));
    PW_ASSIGN_OR_RETURN(const LayoutShape paper,
                        PaperLayoutShape(job_, costs_));
    LayoutShape whole = paper;
    for (size_t m = 0; m < job_.modules.size(); ++m) {
      whole.modules[m] = {job_.max_microbatch_tokens[m], 1, {false}};
    }
    TryAll({paper, whole});
    if (Cancelled()) return WasCancelled();
    if (best_ == nullptr) return failure_;
    if (const Trial& trial = trials_.at(KeyOf(paper)); trial.complete) {
      paper_ = &trial;
    }
    const std::vector<int> order = HeaviestFirst();
    for (bool better = true; better;) {
      better = false;
      for (int m : order) better |= TryAll(Neighbours(*best_, m));
    }
    const Trial* chosen = FewestStages();
    while (true) {
      std::vector<LayoutShape> neighbours;
      for (int m : order) {
        std::vector<LayoutShape> more = Neighbours(*chosen, m);
        std::move(more.begin(), more.end(), std::back_inserter(neighbours));
      }
      TryAll(neighbours);
      const Trial* fewer = FewestStages();
      if (fewer == chosen) break;
      chosen = fewer;
    }
    if (Cancelled()) return WasCancelled();
    if (paper_ != nullptr && chosen != paper_) {
      PW_ASSIGN_OR_RETURN(chosen, FirstConvincing(chosen, held_out));
    }
    RefinedLayout result;
    result.paper_ns = paper_ == nullptr ? -1 : paper_->makespan_ns();
    result.refined_ns = chosen->makespan_ns();
    result.layouts_evaluated = static_cast<int>(trials_.size());
    result.shape = chosen->shape;
    result.is_paper = chosen == paper_;
    result.layout = PlaceLayers(job_, result.shape, times_);
    return result;
  }

 private:
  using Key = std::vector<int64_t>;

  static Key KeyOf(const LayoutShape& shape) {
    Key key;
    for (const LayoutShape::ModuleShape& m : shape.modules) {
      key.push_back(m.sub_microbatch_tokens);
      key.push_back(m.segments);
      key.insert(key.end(), m.descending.begin(), m.descending.end());
    }
    return key;
  }

  // Evaluates the shapes not seen before, and moves best_ to the best of them;
  // false if that is not worthwhile.
  bool TryAll(const std::vector<LayoutShape>& shapes) {
    // A fixed number at a time, whatever the threads: the limits are looked at
    // in between.
    constexpr size_t kTogether = 8;
    const Trial* best = nullptr;
    for (auto shape = shapes.begin(); shape != shapes.end();) {
      std::vector<Trial*> trials;
      for (; shape != shapes.end() && trials.size() < kTogether; ++shape) {
        const bool enough =
            trials_.size() >= static_cast<size_t>(options_.max_layouts) ||
            stages_ >= options_.max_stages || Cancelled();
        if (enough && trials_.size() >= kStarts) break;
        const auto [it, is_new] = trials_.try_emplace(KeyOf(*shape));
        if (!is_new) continue;
        it->second.shape = *shape;
        trials.push_back(&it->second);
      }
      if (trials.empty()) break;
      pool_.Run(static_cast<int>(trials.size()),
                [&](int, int i) { Evaluate(samples_, 0, best_, *trials[i]); });
      if (Cancelled()) break;
      for (const Trial* trial : trials) {
        stages_ += trial->stages;
        if (!trial->status.ok()) failure_ = trial->status;
        if (trial->complete &&
            (best == nullptr || trial->makespan_ns() < best->makespan_ns())) {
          best = trial;
        }
      }
    }
    if (best == nullptr) return false;
    if (best_ != nullptr &&
        !AtMost(best->makespan_ns(), kWorthwhile, best_->makespan_ns())) {
      return false;
    }
    best_ = best;
    return true;
  }

  // Completes `trial` on `batches`, the first of which is number `first`,
  // unless it does not fit or is hopeless beside `best`, which may be null.
  void Evaluate(absl::Span<const semu::Batch> batches, size_t first,
                const Trial* best, Trial& trial) const {
    const semu::Layout layout = PlaceLayers(job_, trial.shape, times_);
    trial.status = [&]() -> absl::Status {
      PW_ASSIGN_OR_RETURN(const MemoryPlan memory,
                          PlanMemory(job_, layout, costs_));
      if (options_.fits) PW_RETURN_IF_ERROR(options_.fits(layout));
      int64_t sum_ns = 0;
      for (size_t i = 0; i < batches.size(); ++i) {
        if (Cancelled()) return absl::OkStatus();
        const auto step = BuildStepProblem(
            job_, layout, memory.activation_limit_bytes, batches[i], costs_,
            {.layer_reserve_bytes = memory.layer_reserve_bytes});
        if (!step.ok()) return OfSample(first + i, step.status());
        int64_t stages = 0;
        for (const Sweep& sweep : step->problem.sweeps) {
          stages += static_cast<int64_t>(sweep.stages.size());
        }
        trial.stages += stages;
        trial.sample_stages.push_back(stages);
        if (best != nullptr &&
            stages > std::max(kManyPairs, paper_ == nullptr
                                              ? 0
                                              : paper_->sample_stages[i])) {
          return absl::OkStatus();
        }
        const absl::StatusOr<int64_t> makespan_ns = evaluator_(*step);
        if (!makespan_ns.ok()) return OfSample(first + i, makespan_ns.status());
        if (__builtin_add_overflow(sum_ns, *makespan_ns, &sum_ns)) {
          return OfSample(first + i,
                          absl::InvalidArgumentError(absl::StrCat(
                              "takes ", *makespan_ns,
                              " ns: all samples' makespans must sum up to less "
                              "than 2^63 ns")));
        }
        trial.sums_ns.push_back(sum_ns);
        if (best != nullptr && !AtMost(sum_ns, options_.no_worse + kMayMakeGood,
                                       best->sums_ns[i])) {
          return absl::OkStatus();
        }
      }
      trial.complete = true;
      return absl::OkStatus();
    }();
  }

  bool Cancelled() const { return options_.cancelled && options_.cancelled(); }

  // The complete trial of least makespan; may be less than best_'s by too
  // little to move on. REQUIRES: there is one.
  const Trial* Shortest() const {
    const Trial* shortest = best_;
    for (const auto& [key, trial] : trials_) {
      if (trial.complete && trial.makespan_ns() < shortest->makespan_ns()) {
        shortest = &trial;
      }
    }
    return shortest;
  }

  // Of the complete trials about as good as the best the one with fewest
  // stages.
  const Trial* FewestStages() const {
    const int64_t least_ns = Shortest()->makespan_ns();
    const Trial* fewest = nullptr;
    for (const auto& [key, trial] : trials_) {
      if (!trial.complete ||
          !AtMost(trial.makespan_ns(), options_.no_worse, least_ns)) {
        continue;
      }
      // Of equals the last: the one of larger sub-microbatches.
      if (fewest == nullptr || trial.stages < fewest->stages ||
          (trial.stages == fewest->stages &&
           trial.makespan_ns() <= fewest->makespan_ns())) {
        fewest = &trial;
      }
    }
    return fewest;
  }

  // The first of `chosen` and the shortest that beats the paper's on the
  // held-out batches (RefineOptions::convincing; any does where the paper's
  // fails there), or else the paper's. REQUIRES: paper_ is set. Errors: where
  // all fail, that of `chosen`; CANCELLED.
  absl::StatusOr<const Trial*> FirstConvincing(
      const Trial* chosen, absl::Span<const semu::Batch> held_out) {
    std::vector<const Trial*> trials = {chosen};
    if (const Trial* shortest = Shortest();
        shortest != chosen && shortest != paper_) {
      trials.push_back(shortest);
    }
    trials.push_back(paper_);
    std::vector<Trial> again(trials.size());
    pool_.Run(static_cast<int>(trials.size()), [&](int, int i) {
      again[i].shape = trials[i]->shape;
      Evaluate(held_out, samples_.size(), nullptr, again[i]);
    });
    if (Cancelled()) return WasCancelled();
    const Trial& paper = again.back();
    for (size_t i = 0; i + 1 < trials.size(); ++i) {
      if (again[i].complete &&
          (!paper.complete ||
           AtMost(again[i].makespan_ns(), options_.convincing,
                  paper.makespan_ns()))) {
        return trials[i];
      }
    }
    if (!paper.complete) return again.front().status;
    return paper_;
  }

  std::vector<int> HeaviestFirst() const {
    std::vector<double> work;
    for (const std::vector<int64_t>& times : times_) {
      work.push_back(static_cast<double>(
          std::accumulate(times.begin(), times.end(), int64_t{0})));
    }
    const double all = std::accumulate(work.begin(), work.end(), 0.0);
    std::vector<int> order;
    for (size_t m = 0; m < work.size(); ++m) {
      if (work[m] >= kLightModule * all) order.push_back(static_cast<int>(m));
    }
    std::stable_sort(order.begin(), order.end(),
                     [&work](int a, int b) { return work[a] > work[b]; });
    return order;
  }

  // The shapes that differ from the trial's in the size or in the segments of
  // `module`.
  std::vector<LayoutShape> Neighbours(const Trial& trial, int module) const {
    const LayoutShape::ModuleShape& now = trial.shape.modules[module];
    std::vector<LayoutShape> shapes;
    const auto add = [&](LayoutShape::ModuleShape changed) {
      LayoutShape shape = trial.shape;
      shape.modules[module] = std::move(changed);
      shapes.push_back(std::move(shape));
    };
    const int64_t whole = job_.max_microbatch_tokens[module];
    const int64_t size = now.sub_microbatch_tokens;
    for (const int64_t tokens :
         {size / 2, size + size / 2, size * 2, size * 4, whole}) {
      LayoutShape::ModuleShape changed = now;
      changed.sub_microbatch_tokens = std::clamp<int64_t>(tokens, 1, whole);
      add(std::move(changed));
    }
    const int most =
        std::max(1, std::min(job_.executor.max_segments,
                             job_.modules[module].NumLayers() /
                                 job_.parallelism.pipeline_parallel));
    for (int segments = 1; segments <= most; ++segments) {
      for (const bool starts_down : {false, true}) {
        for (const bool alternates : {false, true}) {
          const bool ascends = !starts_down && (!alternates || segments == 1);
          if (!ascends && !job_.executor.v_placement) continue;
          if (alternates && segments == 1) continue;
          LayoutShape::ModuleShape changed = now;
          changed.segments = segments;
          changed.descending.assign(segments, false);
          for (int s = 0; s < segments; ++s) {
            changed.descending[s] = starts_down != (alternates && s % 2 == 1);
          }
          add(std::move(changed));
        }
      }
    }
    return shapes;
  }

  const Job& job_;
  const semu::CostModel& costs_;
  const absl::Span<const semu::Batch> samples_;
  const StepEvaluator& evaluator_;
  const RefineOptions& options_;
  WorkerPool pool_;
  LayerTimes times_;
  std::map<Key, Trial> trials_;
  // What others have to better; null before anything fits. Of trials_.
  const Trial* best_ = nullptr;
  // The paper's, null where that does not fit. Of trials_.
  const Trial* paper_ = nullptr;
  int64_t stages_ = 0;  // evaluated
  absl::Status failure_;
};

}  // namespace

absl::Status OfSample(size_t number, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("sample batch ", number, ": ",
                                                  status.message()));
}

absl::StatusOr<RefinedLayout> RefineLayout(
    const semu::Job& job, const semu::CostModel& costs,
    absl::Span<const semu::Batch> samples,
    absl::Span<const semu::Batch> held_out, const StepEvaluator& evaluator,
    const RefineOptions& options) {
  PW_CHECK(!samples.empty() && !held_out.empty());
  PW_CHECK(options.max_layouts >= 1 && options.threads >= 1 &&
           options.no_worse >= 1);
  return Refiner(job, costs, samples, evaluator, options).Run(held_out);
}

}  // namespace pipeweaver::search
