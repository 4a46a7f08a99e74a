// See puppet_planner.h.

#include "server/testing/puppet_planner.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

namespace pipeweaver::server {
namespace {

constexpr int kActionsPerRank = 2;

int64_t LabelOf(const semu::Batch& batch) {
  for (const semu::Microbatch& microbatch : batch.microbatches) {
    for (const auto& items : microbatch.item_tokens) {
      if (!items.empty()) return items[0];
    }
  }
  return 0;
}

class TokenCost : public semu::CostModel {
 public:
  semu::LayerCost Cost(const semu::Platform&,
                       const semu::LayerQuery& query) const override {
    semu::LayerCost cost;
    for (semu::StrategyCost& strategy : cost.strategies) {
      strategy.forward_ns = query.shape.tokens;
      strategy.input_grad_ns = query.shape.tokens;
      strategy.weight_grad_ns = query.shape.tokens;
    }
    return cost;
  }
  std::string Fingerprint() const override { return "tokens"; }
};

}  // namespace

std::shared_ptr<const semu::CostModel> PuppetPlanner::Costs() const {
  static const auto* costs =
      new std::shared_ptr<const semu::CostModel>(std::make_shared<TokenCost>());
  return *costs;
}

semu::Batch LabelledBatch(int64_t label) {
  semu::Batch batch;
  batch.microbatches.resize(1);
  batch.microbatches[0].item_tokens = {{label}};
  return batch;
}

void PuppetPlanner::WaitForPlans(int count) {
  MutexLock lock(&mutex_);
  while (static_cast<int>(calls_.size()) < count) changed_.Wait(&mutex_);
}

void PuppetPlanner::Finish(int64_t label, bool finished) {
  MutexLock lock(&mutex_);
  releases_.push_back({label, finished, absl::OkStatus()});
  changed_.NotifyAll();
}

void PuppetPlanner::Fail(int64_t label, absl::Status status) {
  MutexLock lock(&mutex_);
  releases_.push_back({label, true, std::move(status)});
  changed_.NotifyAll();
}

std::vector<PuppetPlanner::Call> PuppetPlanner::calls() const {
  MutexLock lock(&mutex_);
  return calls_;
}

void PuppetPlanner::WaitForPrepares(int count) {
  MutexLock lock(&mutex_);
  while (prepares_held_ < count) changed_.Wait(&mutex_);
}

void PuppetPlanner::FailPrepare(absl::Status status) {
  MutexLock lock(&mutex_);
  prepare_status_ = std::move(status);
}

void PuppetPlanner::FailSafe(absl::Status status) {
  MutexLock lock(&mutex_);
  safe_status_ = std::move(status);
}

absl::StatusOr<std::shared_ptr<const search::PlannableJob>>
PuppetPlanner::Prepare(const semu::Job& job,
                       const std::optional<semu::Layout>& pinned,
                       const search::PrepareOptions& options) const {
  bool hold = false;
  int held_before = 0;
  {
    MutexLock lock(&mutex_);
    if (!prepare_status_.ok()) return prepare_status_;
    if (fail_reserves_ &&
        std::any_of(options.extra_reserve_bytes.begin(),
                    options.extra_reserve_bytes.end(),
                    [](int64_t bytes) { return bytes > 0; })) {
      return absl::ResourceExhaustedError("the reserve does not fit");
    }
    hold = hold_prepares_ > 0;
    if (hold) {
      --hold_prepares_;
      held_before = prepares_held_++;
    }
    changed_.NotifyAll();
  }
  while (hold) {
    if (options.cancelled && options.cancelled()) {
      return absl::CancelledError("Prepare was held");
    }
    {
      MutexLock lock(&mutex_);
      hold = prepares_released_ <= held_before;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  auto plannable = std::make_shared<search::PlannableJob>();
  plannable->job = job;
  const int ranks = job.parallelism.pipeline_parallel;
  if (pinned.has_value()) {
    plannable->layout = *pinned;
  } else {
    for (const semu::Module& module : job.modules) {
      semu::ModuleLayout layout;
      layout.sub_microbatch_tokens = 1;
      layout.segments.resize(1);
      for (int rank = 0; rank < ranks; ++rank) {
        const int layers = rank == 0 ? module.NumLayers() : 0;
        layout.segments[0].chunks.push_back(
            {rank, rank == 0 ? 0 : module.NumLayers(), layers});
      }
      plannable->layout.modules.push_back(layout);
    }
  }
  plannable->costs = options.costs;
  plannable->extra_reserve_bytes = options.extra_reserve_bytes;
  plannable->activation_limit_bytes.assign(ranks, int64_t{1} << 30);
  plannable->static_bytes.assign(ranks, 0);
  return plannable;
}

search::StepPlan PuppetPlanner::MakePlan(const search::PlannableJob& job,
                                         int64_t label,
                                         const std::string& strategy) const {
  const int ranks = job.job.parallelism.pipeline_parallel;
  search::StepPlan plan;
  plan.step.problem.ranks = ranks;
  plan.step.sub_microbatches.push_back({0, 0, {0}, label});
  plan.step.shapes.push_back({1, label, label * label, label, 0, 0});
  plan.step.sweeps.push_back({0, 0});
  search::Sweep sweep;
  sweep.stages.resize(ranks);
  for (int rank = 0; rank < ranks; ++rank) {
    sweep.stages[rank].rank = rank;
    sweep.stages[rank].choices.Mutable().emplace_back();
  }
  plan.step.problem.sweeps.push_back(sweep);
  std::vector<std::vector<search::MemoryChoice>> choices;
  for (int rank = 0; rank < ranks; ++rank) {
    const int layers =
        job.layout.modules.empty()
            ? 1
            : job.layout.modules[0].segments[0].chunks[rank].num_layers;
    choices.push_back({{"keep", 0, 0, 0, layers, 0}});
  }
  plan.step.choices = {{std::move(choices)}};
  plan.schedule.ranks.resize(ranks);
  plan.programs.ranks.resize(ranks);
  for (int rank = 0; rank < ranks; ++rank) {
    plan.schedule.ranks[rank].push_back(
        {search::StageKind::kForward, 0, rank, 0});
    for (int i = 0; i < kActionsPerRank; ++i) {
      search::Action action;
      action.kind = i % 2 == 0 ? search::ActionKind::kForward
                               : search::ActionKind::kBackward;
      action.sweep = 0;
      action.stage = rank;
      action.start_ns = i * label;
      action.end_ns = (i + 1) * label;
      plan.programs.ranks[rank].push_back(action);
    }
  }
  plan.programs.makespan_ns = label;
  plan.programs.peak_bytes.assign(ranks, 1);
  plan.report.strategy = strategy;
  plan.report.makespan_ns = label;
  plan.report.schedule_makespan_ns = label;
  plan.report.lower_bound_ns = label;
  plan.report.peak_memory_bytes = job.extra_reserve_bytes;
  plan.report.peak_memory_bytes.resize(ranks, 0);
  return plan;
}

absl::StatusOr<search::StepPlan> PuppetPlanner::Plan(
    const search::PlannableJob& job, const semu::Batch& batch,
    const search::PlanOptions& options) const {
  MutexLock lock(&mutex_);
  const int64_t label = LabelOf(batch);
  Call call{label, options, !options.search.warm_settings.empty()};
  call.options.search.warm_start = nullptr;
  call.options.search.budget.cancelled = nullptr;
  calls_.push_back(call);
  changed_.NotifyAll();
  bool finished = true;
  while (hold_) {
    const auto release = std::find_if(
        releases_.begin(), releases_.end(),
        [label](const Release& item) { return item.label == label; });
    if (release != releases_.end()) {
      const absl::Status status = release->status;
      finished = release->finished;
      releases_.erase(release);
      if (!status.ok()) return status;
      break;
    }
    if (options.search.budget.cancelled != nullptr &&
        options.search.budget.cancelled->load()) {
      finished = false;
      break;
    }
    // Nobody notifies of the flag, so look again soon.
    changed_.WaitUntil(&mutex_, std::chrono::steady_clock::now() +
                                    std::chrono::milliseconds(1));
  }
  search::StepPlan plan = MakePlan(
      job, label, options.strategy.empty() ? "puppet" : options.strategy);
  plan.report.finished = finished;
  plan.report.lower_ns = lower_ns_;
  plan.settings = {1};
  return plan;
}

absl::StatusOr<search::StepPlan> PuppetPlanner::PlanSafe(
    const search::PlannableJob& job, const semu::Batch& batch) const {
  MutexLock lock(&mutex_);
  ++safe_calls_;
  if (!safe_status_.ok()) return safe_status_;
  return MakePlan(job, LabelOf(batch), "safe");
}

}  // namespace pipeweaver::server
