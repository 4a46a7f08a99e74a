// Coordinate descent from two starts.

#include "search/partition/layout_refiner.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>

#include "search/partition/batch_split.h"
#include "search/partition/memory_plan.h"
#include "search/partition/step_problem_builder.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Job;

constexpr double kWorthwhile = 0.999;
constexpr double kLightModule = 0.02;
// Of the best layout's makespan on the first sample: beyond, a layout is not
// looked at further.
constexpr double kHopeless = 1.02;
// Of the paper's makespan on the held-out batch.
constexpr double kConvincing = 0.98;

class Refiner {
 public:
  Refiner(const Job& job, const semu::CostModel& costs,
          absl::Span<const semu::Batch> samples, const StepEvaluator& evaluator,
          const RefineOptions& options)
      : job_(job),
        costs_(costs),
        samples_(samples),
        evaluator_(evaluator),
        options_(options) {
    semu::Batch all;
    for (const semu::Batch& batch : samples) {
      all.microbatches.insert(all.microbatches.end(),
                              batch.microbatches.begin(),
                              batch.microbatches.end());
    }
    times_ = MeanLayerTimes(job, all, costs);
  }

  absl::StatusOr<RefinedLayout> Run(const semu::Batch& held_out) {
    const LayoutShape paper = PaperLayoutShape(job_, costs_);
    Try(paper);
    result_.paper_ns = best_ns_.value_or(-1);
    LayoutShape whole = paper;
    for (size_t m = 0; m < job_.modules.size(); ++m) {
      whole.modules[m] = {job_.max_microbatch_tokens[m], 1, {false}};
    }
    Try(whole);
    const std::vector<int> order = HeaviestFirst();
    for (bool better = true; better;) {
      better = false;
      for (int m : order) {
        better |= TrySegments(m);
        better |= TrySizes(m);
      }
    }
    if (!best_ns_.has_value()) return failure_;
    result_.refined_ns = *best_ns_;
    result_.layouts_evaluated = tried_;
    if (result_.paper_ns >= 0 && !Convinces(result_.shape, paper, held_out)) {
      result_.is_paper = true;
      result_.shape = paper;
    }
    result_.layout = PlaceLayers(job_, result_.shape, times_);
    return std::move(result_);
  }

 private:
  // Evaluates `shape` and takes it if it is worthwhile.
  bool Try(const LayoutShape& shape) {
    if (tried_ >= options_.max_layouts ||
        (tried_ > 0 && stages_ >= options_.max_stages)) {
      return false;
    }
    ++tried_;
    int64_t sum_ns = 0, first_ns = 0;
    for (size_t i = 0; i < samples_.size(); ++i) {
      const absl::StatusOr<int64_t> ns = Evaluate(shape, samples_[i]);
      if (!ns.ok()) {
        failure_ = ns.status();
        return false;
      }
      if (i == 0) first_ns = *ns;
      sum_ns += *ns;
      if (best_ns_.has_value() &&
          static_cast<double>(first_ns) >
              kHopeless * static_cast<double>(best_first_ns_)) {
        return false;
      }
    }
    if (best_ns_.has_value() &&
        static_cast<double>(sum_ns) >
            kWorthwhile * static_cast<double>(*best_ns_)) {
      return false;
    }
    best_ns_ = sum_ns;
    best_first_ns_ = first_ns;
    result_.shape = shape;
    return true;
  }

  absl::StatusOr<int64_t> Evaluate(const LayoutShape& shape,
                                   const semu::Batch& batch) {
    const semu::Layout layout = PlaceLayers(job_, shape, times_);
    PW_ASSIGN_OR_RETURN(const MemoryPlan memory,
                        PlanMemory(job_, layout, costs_));
    PW_ASSIGN_OR_RETURN(
        const StepProblem step,
        BuildStepProblem(job_, layout, memory.activation_limit_bytes, batch,
                         costs_));
    for (const Sweep& sweep : step.problem.sweeps) {
      stages_ += static_cast<int64_t>(sweep.stages.size());
    }
    return evaluator_(step);
  }

  bool Convinces(const LayoutShape& shape, const LayoutShape& paper,
                 const semu::Batch& held_out) {
    const absl::StatusOr<int64_t> ns = Evaluate(shape, held_out);
    const absl::StatusOr<int64_t> paper_ns = Evaluate(paper, held_out);
    if (!ns.ok() || !paper_ns.ok()) return ns.ok();
    return static_cast<double>(*ns) <=
           kConvincing * static_cast<double>(*paper_ns);
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

  bool TrySegments(int module) {
    const int ranks = job_.parallelism.pipeline_parallel;
    const int most =
        std::max(1, std::min(job_.executor.max_segments,
                             job_.modules[module].NumLayers() / ranks));
    bool better = false;
    for (int segments = 1; segments <= most; ++segments) {
      for (const bool starts_down : {false, true}) {
        for (const bool alternates : {false, true}) {
          const bool ascends = !starts_down && (!alternates || segments == 1);
          if (!ascends && !job_.executor.v_placement) continue;
          if (alternates && segments == 1) continue;
          if (!best_ns_.has_value()) return false;
          LayoutShape shape = result_.shape;
          LayoutShape::ModuleShape& m = shape.modules[module];
          std::vector<bool> descending(segments);
          for (int s = 0; s < segments; ++s) {
            descending[s] = starts_down != (alternates && s % 2 == 1);
          }
          if (segments == m.segments && descending == m.descending) continue;
          m.segments = segments;
          m.descending = std::move(descending);
          better |= Try(shape);
        }
      }
    }
    return better;
  }

  bool TrySizes(int module) {
    if (!best_ns_.has_value()) return false;
    bool better = false;
    const int64_t whole = job_.max_microbatch_tokens[module];
    const int64_t now = result_.shape.modules[module].sub_microbatch_tokens;
    int64_t before = now;
    for (int64_t tokens : {now / 2, now * 2, now * 4, whole}) {
      tokens = std::clamp<int64_t>(tokens, 1, whole);
      if (tokens == now || tokens == before) continue;
      before = tokens;
      LayoutShape shape = result_.shape;
      shape.modules[module].sub_microbatch_tokens = tokens;
      better |= Try(shape);
    }
    return better;
  }

  const Job& job_;
  const semu::CostModel& costs_;
  const absl::Span<const semu::Batch> samples_;
  const StepEvaluator& evaluator_;
  const RefineOptions& options_;
  LayerTimes times_;
  RefinedLayout result_;
  std::optional<int64_t> best_ns_;
  int64_t best_first_ns_ = 0;  // of it, on the first sample
  int64_t stages_ = 0;
  absl::Status failure_;
  int tried_ = 0;
};

}  // namespace

absl::StatusOr<RefinedLayout> RefineLayout(
    const Job& job, const semu::CostModel& costs,
    absl::Span<const semu::Batch> samples, const semu::Batch& held_out,
    const StepEvaluator& evaluator, const RefineOptions& options) {
  PW_CHECK(!samples.empty());
  PW_CHECK(options.max_layouts >= 1);
  return Refiner(job, costs, samples, evaluator, options).Run(held_out);
}

}  // namespace pipeweaver::search
