#include "search/planner.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "search/lower/coverage_checker.h"
#include "search/lower/lower.h"
#include "search/lower/program_checker.h"
#include "search/partition/baselines.h"
#include "search/partition/heaviest_batch.h"
#include "search/partition/layout_planner.h"
#include "search/partition/layout_refiner.h"
#include "search/partition/memory_plan.h"
#include "search/partition/step_problem_builder.h"
#include "search/partition/usual_batch.h"
#include "search/plan/plan_checker.h"
#include "search/plan/safe_order.h"
#include "search/plan_evaluator.h"
#include "search/problem/bound.h"
#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "search/strategy/registry.h"
#include "search/strategy/worker_pool.h"
#include "semu/base/limits.h"
#include "semu/base/status_macros.h"
#include "semu/cost/op_graph_cost.h"

namespace pipeweaver::search {
namespace {

using WallClock = std::chrono::steady_clock;

int64_t NanosecondsSince(WallClock::time_point start) {
  return (WallClock::now() - start) / std::chrono::nanoseconds(1);
}

// Completes the causes of the idle time, those of the schedule so far, by what
// emulation adds: waits for host copies, and for transfers that contend. Where
// it takes less, because copies overlap more, all causes shrink alike.
void SetBubbles(const semu::EmulatedStep& emulated, StepReport* report) {
  int64_t busy_ns = 0, copy_wait_ns = 0;
  for (const semu::EmulatedStep::Rank& rank : emulated.ranks) {
    busy_ns += rank.busy_ns;
    copy_wait_ns += rank.copy_wait_ns;
  }
  int64_t all_ns = 0;
  if (__builtin_mul_overflow(static_cast<int64_t>(emulated.ranks.size()),
                             emulated.makespan_ns, &all_ns)) {
    return;  // out of proportion, and no use to anybody
  }
  const int64_t idle_ns = all_ns - busy_ns;
  report->bubble_ratio =
      all_ns == 0 ? 0
                  : static_cast<double>(idle_ns) / static_cast<double>(all_ns);
  BubbleCauses& causes = report->bubbles;
  const int64_t known_ns = causes.imbalance_ns + causes.dependency_ns +
                           causes.memory_ns + causes.transfer_ns;
  if (idle_ns >= known_ns) {
    const int64_t copies_ns = std::min(copy_wait_ns, idle_ns - known_ns);
    causes.memory_ns += copies_ns;
    causes.transfer_ns += idle_ns - known_ns - copies_ns;
    return;
  }
  const double share =
      static_cast<double>(idle_ns) / static_cast<double>(known_ns);
  for (int64_t* cause :
       {&causes.imbalance_ns, &causes.memory_ns, &causes.transfer_ns}) {
    *cause = static_cast<int64_t>(share * static_cast<double>(*cause));
  }
  causes.dependency_ns =
      idle_ns - causes.imbalance_ns - causes.memory_ns - causes.transfer_ns;
}

// `graph` with transfers between ranks longer by `padding` mean forwards.
ProblemGraph Padded(ProblemGraph graph, double padding) {
  double forwards_ns = 0;
  for (int p = 0; p < graph.pairs; ++p) {
    forwards_ns += static_cast<double>(graph.choices_of(p)[0].forward_ns);
  }
  const auto room_ns =
      static_cast<int64_t>(padding * forwards_ns / std::max(1, graph.pairs));
  for (int p = 0; p < graph.pairs; ++p) {
    const auto pad = [&](GraphEdge& edge) {
      if (graph.pair_rank[edge.pair] != graph.pair_rank[p]) {
        edge.delay_ns += room_ns;
      }
    };
    for (int e = graph.producer_begin[p]; e < graph.producer_begin[p + 1];
         ++e) {
      pad(graph.producers[e]);
    }
    for (int e = graph.consumer_begin[p]; e < graph.consumer_begin[p + 1];
         ++e) {
      pad(graph.consumers[e]);
    }
  }
  return graph;
}

// No layout of the same stages ends before the ranks have shared their least
// work evenly.
int64_t LayoutFreeBound(const ProblemGraph& graph) {
  double work_ns = 0;
  for (int p = 0; p < graph.pairs; ++p) {
    int64_t least_ns = std::numeric_limits<int64_t>::max();
    for (const GraphChoice& choice : graph.choices_of(p)) {
      int64_t backward_ns = 0;
      if (graph.mode[p] == PairMode::kSplit) {
        backward_ns = choice.input_grad_ns + choice.weight_grad_ns;
        if (choice.has_backward()) {
          backward_ns = std::min(backward_ns, choice.backward_ns);
        }
      } else if (graph.mode[p] == PairMode::kWhole) {
        backward_ns = choice.backward_ns;
      }
      least_ns = std::min(least_ns, choice.forward_ns + backward_ns);
    }
    work_ns += static_cast<double>(least_ns);
  }
  return static_cast<int64_t>(work_ns / graph.ranks);
}

// Microbatches of a batch that is made up for a job: such that its pipeline
// fills, as far as a layout of a few segments a module or sub-microbatches a
// microbatch stays within BuildStepProblem's most stages.
int MadeUpMicrobatches(const semu::Job& job) {
  constexpr int kFewest = 32;
  constexpr int kMostStages = 1 << 18;  // of one segment a module
  const int ranks = job.parallelism.pipeline_parallel;
  int stages = 0;  // of a microbatch
  for (const semu::Module& module : job.modules) {
    stages += std::min(ranks, module.NumLayers());
  }
  return std::min(std::max(kFewest, 2 * ranks), kMostStages / stages);
}

// Those of a sample that count.
semu::Batch FirstMicrobatches(const semu::Batch& sample) {
  semu::Batch first;
  first.microbatches.assign(sample.microbatches.begin(),
                            sample.microbatches.begin() +
                                std::min<size_t>(sample.microbatches.size(),
                                                 semu::kSampleMicrobatches));
  return first;
}

// The layout of least simulated makespan on the samples, or where there are
// none on batches such as the job's limits allow; deterministic. `fits` is
// RefineOptions's.
absl::StatusOr<semu::Layout> ProposeLayout(
    const semu::Job& job, const semu::CostModel& costs,
    const PrepareOptions& prepare,
    std::function<absl::Status(const semu::Layout&)> fits) {
  // Every problem gets about as much effort, as it does when steps are planned
  // within a time: large ones are judged by fewer schedules. A handful would be
  // unfair to layouts of few stages, which a search betters the most.
  constexpr int64_t kMostEvaluations = 300;
  int64_t stages_per_problem = 30'000;
  RefineOptions options;
  options.fits = std::move(fits);
  options.cancelled = prepare.cancelled;
  options.threads = prepare.threads;
  std::vector<semu::Batch> samples;
  size_t held_out = 1;
  if (prepare.samples.empty()) {
    // Made-up batches do not tell smaller differences.
    options.no_worse = 1.008;
    for (const uint64_t seed : {1, 2, 3}) {
      samples.push_back(VariedBatch(job, MadeUpMicrobatches(job), seed));
    }
  } else {
    for (const semu::Batch& sample : prepare.samples) {
      samples.push_back(FirstMicrobatches(sample));
    }
    held_out = std::max<size_t>(1, samples.size() / 3);
    // A single one has to do for both.
    if (samples.size() == 1) samples.push_back(samples[0]);
    // What is found on real batches is believed sooner, and worth more time.
    // Predictions do not tell less than no_worse, and leave out what every
    // stage costs the ranks that run it.
    options.no_worse = 1.004;
    options.convincing = 0.995;
    options.max_stages =
        500'000 * static_cast<int64_t>(samples.size() - held_out);
    stages_per_problem = 100'000;
  }
  const std::unique_ptr<Strategy> strategy =
      MakeStrategy(StrategyNames().front());
  const auto evaluate =
      [&](const StepProblem& step) -> absl::StatusOr<int64_t> {
    int64_t stages = 1;
    for (const Sweep& sweep : step.problem.sweeps) {
      stages += static_cast<int64_t>(sweep.stages.size());
    }
    SearchOptions search;
    search.budget.evaluations =
        std::clamp<int64_t>(stages_per_problem / stages, 1, kMostEvaluations);
    PW_ASSIGN_OR_RETURN(
        const SearchResult result,
        strategy->Solve(BuildProblemGraph(step.problem), search));
    return result.makespan_ns;
  };
  const absl::Span<const semu::Batch> all = samples;
  absl::StatusOr<RefinedLayout> refined =
      RefineLayout(job, costs, all.first(all.size() - held_out),
                   all.last(held_out), evaluate, options);
  if (refined.ok()) return std::move(refined->layout);
  // That no plan was found for made-up batches says nothing about the job.
  if (prepare.samples.empty() && !absl::IsCancelled(refined.status())) {
    return PlanLayout(job, costs);
  }
  return refined.status();
}

// Takes `extra` bytes a rank from the activations. RESOURCE_EXHAUSTED where
// they are not there.
absl::Status SetAside(const semu::Job& job, const std::vector<int64_t>& extra,
                      MemoryPlan* memory) {
  for (size_t rank = 0; rank < extra.size(); ++rank) {
    if (extra[rank] >= memory->activation_limit_bytes[rank]) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "rank ", rank, " needs ", memory->static_bytes[rank], " bytes and ",
          extra[rank],
          " more that it was seen to use: the limit is memory_budget_bytes = ",
          job.memory_budget_bytes));
    }
    memory->static_bytes[rank] += extra[rank];
    memory->activation_limit_bytes[rank] -= extra[rank];
  }
  return absl::OkStatus();
}

class Planner : public StepPlanner {
 public:
  explicit Planner(std::shared_ptr<const semu::CostModel> costs)
      : costs_(std::move(costs)) {}

  absl::StatusOr<std::shared_ptr<const PlannableJob>> Prepare(
      const semu::Job& job, const std::optional<semu::Layout>& pinned,
      const PrepareOptions& options) const override {
    const auto on_layout = [&](const semu::Layout& layout) {
      return PrepareOn(layout, job, options);
    };
    if (pinned) {
      PW_ASSIGN_OR_RETURN(auto prepared, on_layout(*pinned));
      for (size_t i = 0; i < options.samples.size(); ++i) {
        if (options.cancelled && options.cancelled()) {
          return absl::CancelledError("the registration was cancelled");
        }
        const auto plan =
            PlanSafe(*prepared, FirstMicrobatches(options.samples[i]));
        if (!plan.ok()) return OfSample(i, plan.status());
      }
      return prepared;
    }
    PW_ASSIGN_OR_RETURN(const semu::Layout layout,
                        ProposeLayout(job, *CostsOf(options), options,
                                      [&](const semu::Layout& tried) {
                                        return on_layout(tried).status();
                                      }));
    return on_layout(layout);
  }

  absl::StatusOr<StepPlan> Plan(const PlannableJob& job,
                                const semu::Batch& batch,
                                const PlanOptions& options) const override {
    const std::string name = options.strategy.empty()
                                 ? search::StrategyNames().front()
                                 : options.strategy;
    if (const std::optional<Baseline> baseline = BaselineFromName(name)) {
      return PlanByBaseline(
          job, options.reference == nullptr ? batch : *options.reference, batch,
          *baseline, options.search.budget.cancelled);
    }
    const std::unique_ptr<Strategy> strategy = MakeStrategy(name);
    if (strategy == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("strategy: ", name, ": must be one of ",
                       absl::StrJoin(StrategyNames(), ", ")));
    }
    if (options.search.pool == nullptr) {
      WorkerPool pool(options.search.threads);
      PlanOptions with_pool = options;
      with_pool.search.pool = &pool;
      return Plan(job, batch, with_pool);
    }
    if (options.jitter.duration_noise > 0) {
      return PlanForJitter(job, batch, *strategy, name, options);
    }
    return PlanBySearch(job, batch, *strategy, name, options.search,
                        /*padding=*/0);
  }

  absl::StatusOr<StepPlan> PlanSafe(const PlannableJob& job,
                                    const semu::Batch& batch) const override {
    // A trainer makes the same program for itself (client_agents/python's
    // memory.py), so no time may have a say in it.
    StepProblemOptions options;
    options.uniform_choices = true;
    WorkerPool pool(/*threads=*/1);
    return PlanOffloadingOrNot(
        job, batch, options, pool,
        [](const Problem& problem, const ProblemGraph& graph,
           StepPlan& plan) -> absl::Status {
          SetBounds(graph, &plan.report);
          PW_ASSIGN_OR_RETURN(plan.schedule, SafeOrder(problem));
          plan.report.strategy = "safe";
          plan.report.finished = true;
          return absl::OkStatus();
        });
  }

  std::shared_ptr<const semu::CostModel> Costs() const override {
    return costs_;
  }

  std::vector<std::string> StrategyNames() const override {
    std::vector<std::string> names = search::StrategyNames();
    for (const Baseline baseline : AllBaselines()) {
      names.emplace_back(BaselineName(baseline));
    }
    return names;
  }

 private:
  std::shared_ptr<const semu::CostModel> CostsOf(
      const PrepareOptions& options) const {
    return options.costs != nullptr ? options.costs : costs_;
  }

  absl::StatusOr<std::shared_ptr<const PlannableJob>> PrepareOn(
      const semu::Layout& layout, const semu::Job& job,
      const PrepareOptions& options) const {
    auto prepared = std::make_shared<PlannableJob>();
    prepared->job = job;
    prepared->costs = CostsOf(options);
    prepared->layout = layout;
    PW_ASSIGN_OR_RETURN(MemoryPlan memory,
                        PlanMemory(job, layout, *prepared->costs));
    PW_RETURN_IF_ERROR(SetAside(job, options.extra_reserve_bytes, &memory));
    prepared->extra_reserve_bytes = options.extra_reserve_bytes;
    prepared->static_bytes = std::move(memory.static_bytes);
    prepared->activation_limit_bytes = std::move(memory.activation_limit_bytes);
    prepared->transfer_bytes = memory.transfer_bytes;
    prepared->layer_reserve_bytes = std::move(memory.layer_reserve_bytes);
    // The safe order can always hold one microbatch alone. So what fits the
    // heaviest ones fits any whose items are consumed once, and are not so long
    // that a layer needs more than its reserve.
    for (const HeavyBatch& heavy : HeaviestBatches(job, layout)) {
      const auto plan = PlanSafe(*prepared, heavy.batch);
      if (plan.ok()) continue;
      return absl::Status(
          plan.status().code(),
          absl::StrCat("a microbatch of max_microbatch_tokens (",
                       absl::StrJoin(job.max_microbatch_tokens, ", "), ") ",
                       heavy.description,
                       " by the safe program: ", plan.status().message()));
    }
    return std::shared_ptr<const PlannableJob>(std::move(prepared));
  }

  // Searches a problem whose transfers between ranks take `padding` mean
  // forwards longer than they do, which keeps dependent stages apart.
  static absl::StatusOr<StepPlan> PlanBySearch(const PlannableJob& job,
                                               const semu::Batch& batch,
                                               const Strategy& strategy,
                                               const std::string& name,
                                               SearchOptions search,
                                               double padding) {
    std::optional<WallClock::time_point>& deadline = search.budget.deadline;
    const WallClock::duration time =
        deadline ? *deadline - WallClock::now() : WallClock::duration::zero();
    bool again = false;
    return PlanOffloadingOrNot(
        job, batch, StepProblemOptions{}, *search.pool,
        [&](const Problem&, const ProblemGraph& graph,
            StepPlan& plan) -> absl::Status {
          const WallClock::time_point start = WallClock::now();
          // A search with no time left would be as good as none.
          if (again && deadline) {
            deadline = std::max(*deadline, start + time / 2);
          }
          again = true;
          SetBounds(graph, &plan.report);
          search.lower_bound_ns.reset();
          if (padding == 0) search.lower_bound_ns = plan.report.lower_bound_ns;
          PW_ASSIGN_OR_RETURN(
              SearchResult result,
              padding > 0 ? strategy.Solve(Padded(graph, padding), search)
                          : strategy.Solve(graph, search));
          plan.report.search_ns += NanosecondsSince(start);
          plan.report.strategy = name;
          plan.report.evaluations = result.evaluations;
          plan.report.finished = !deadline || WallClock::now() < *deadline;
          plan.schedule = std::move(result.schedule);
          plan.settings = std::move(result.settings);
          return absl::OkStatus();
        });
  }

  // The plan of least expected makespan among those of several paddings.
  static absl::StatusOr<StepPlan> PlanForJitter(const PlannableJob& job,
                                                const semu::Batch& batch,
                                                const Strategy& strategy,
                                                const std::string& name,
                                                const PlanOptions& options) {
    // Of padding, and of the budget: the plain plan needs most of it, the
    // others start from that.
    constexpr double kPaddings[] = {0, 0.05, 0.2};
    constexpr double kShares[] = {0.7, 0.15, 0.15};
    const JitterOptions& jitter = options.jitter;
    if (!(jitter.duration_noise <= 1) || jitter.runs < 1) {
      return absl::InvalidArgumentError(absl::StrCat(
          "jitter: duration_noise ", jitter.duration_noise, " and runs ",
          jitter.runs, ", must be 0 to 1 and at least 1"));
    }
    std::optional<StepPlan> best;
    Schedule plain;
    std::vector<int32_t> settings = options.search.warm_settings;
    int64_t search_ns = 0, evaluations = 0;
    const WallClock::time_point start = WallClock::now();
    for (size_t i = 0; i < std::size(kPaddings); ++i) {
      SearchOptions search = options.search;
      if (i > 0) search.warm_start = &plain;
      search.warm_settings = settings;
      SearchBudget& budget = search.budget;
      if (budget.evaluations > 0) {
        const int64_t left = budget.evaluations - evaluations;
        if (best && left <= 0) break;
        budget.evaluations = std::clamp<int64_t>(
            static_cast<int64_t>(kShares[i] *
                                 static_cast<double>(budget.evaluations)),
            1, std::max<int64_t>(1, left));
      }
      if (budget.deadline) {
        const WallClock::time_point now = WallClock::now();
        if (best && now >= *budget.deadline) break;
        budget.deadline = std::min(
            *budget.deadline,
            now + std::chrono::duration_cast<WallClock::duration>(
                      kShares[i] *
                      std::chrono::duration<double>(*budget.deadline - start)));
      }
      absl::StatusOr<StepPlan> plan =
          PlanBySearch(job, batch, strategy, name, search, kPaddings[i]);
      if (!plan.ok()) {
        if (best) continue;
        return plan.status();
      }
      if (i == 0) {
        plain = plan->schedule;
        settings = plan->settings;
      }
      search_ns += plan->report.search_ns;
      evaluations += plan->report.evaluations;
      const PlanEvaluator evaluator(plan->step, plan->programs,
                                    LinkSpeedsOf(job.job));
      double sum_ns = 0;  // many makespans could pass int64
      for (int run = 0; run < jitter.runs; ++run) {
        PW_ASSIGN_OR_RETURN(
            const StepEvaluation evaluation,
            evaluator.Evaluate({.duration_noise = jitter.duration_noise,
                                .seed = jitter.seed + run}));
        sum_ns += static_cast<double>(evaluation.makespan_ns);
      }
      plan->report.expected_makespan_ns =
          static_cast<int64_t>(sum_ns / jitter.runs);
      if (!best || plan->report.expected_makespan_ns <
                       best->report.expected_makespan_ns) {
        best = *std::move(plan);
      }
    }
    best->report.search_ns = search_ns;
    best->report.evaluations = evaluations;
    return *std::move(best);
  }

  // Plans with `solve`, which may be called several times. The scheduling
  // problem takes a host copy for as long as it is beside its stage; where
  // there is no room to copy ahead, emulation shows that it takes longer, and a
  // plan that does not offload may be shorter.
  template <typename Solve>
  static absl::StatusOr<StepPlan> PlanOffloadingOrNot(
      const PlannableJob& job, const semu::Batch& batch,
      StepProblemOptions options, WorkerPool& pool, const Solve& solve) {
    options.pool = &pool;
    options.layer_reserve_bytes = job.layer_reserve_bytes;
    absl::StatusOr<StepPlan> plan =
        PlanWithRoomForTransfers(job, batch, options, pool, StepPlan(), solve);
    if (!job.job.executor.offload) return plan;
    StepPlan other;
    if (plan.ok()) {
      const StepReport& report = plan->report;
      if (!Offloads(plan->programs) ||
          report.makespan_ns <= report.schedule_makespan_ns) {
        return plan;
      }
      other.report.search_ns = report.search_ns;
    } else if (!absl::IsResourceExhausted(plan.status())) {
      return plan;
    }
    options.offload = false;
    absl::StatusOr<StepPlan> without = PlanWithRoomForTransfers(
        job, batch, options, pool, std::move(other), solve);
    if (without.ok() && (!plan.ok() || without->report.makespan_ns <
                                           plan->report.makespan_ns)) {
      // The bound of both ways.
      if (plan.ok()) {
        int64_t& bound_ns = without->report.flow_lower_bound_ns;
        bound_ns = std::min(bound_ns, plan->report.flow_lower_bound_ns);
      }
      return without;
    }
    return plan;
  }

  static bool Offloads(const StepPrograms& programs) {
    return std::any_of(
        programs.ranks.begin(), programs.ranks.end(), [](const auto& program) {
          return std::any_of(
              program.begin(), program.end(),
              [](const Action& a) { return a.kind == ActionKind::kOffload; });
        });
  }

  // The scheduling problem counts no transfers, nor what is copied to the host
  // until it is there; where these need more than the reserve holds, the
  // problem gets less memory and is solved again. Completes `plan`.
  template <typename Solve>
  static absl::StatusOr<StepPlan> PlanWithRoomForTransfers(
      const PlannableJob& job, const semu::Batch& batch,
      const StepProblemOptions& options, WorkerPool& pool, StepPlan plan,
      const Solve& solve) {
    int64_t set_aside_bytes = 0;
    absl::Status transfers_fit;
    while (true) {
      std::vector<int64_t> limits = job.activation_limit_bytes;
      for (int64_t& limit : limits) {
        limit = std::max<int64_t>(0, limit - set_aside_bytes);
      }
      PW_ASSIGN_OR_RETURN(plan.step,
                          BuildStepProblem(job.job, job.layout, limits, batch,
                                           *job.costs, options));
      const ProblemGraph graph = BuildProblemGraph(plan.step.problem);
      const int64_t flow_bound_ns = plan.report.flow_lower_bound_ns;
      const absl::Status solved = solve(plan.step.problem, graph, plan);
      // With less memory it may be above what all of it allows.
      if (set_aside_bytes > 0) plan.report.flow_lower_bound_ns = flow_bound_ns;
      // That less memory is too little says nothing about the batch.
      if (!solved.ok()) {
        return set_aside_bytes > 0 && absl::IsResourceExhausted(solved)
                   ? transfers_fit
                   : solved;
      }
      transfers_fit =
          Finish(job.job, batch, MemoryOf(job, plan.step), graph, pool, &plan);
      if (transfers_fit.ok()) return plan;
      const bool nothing_left =
          *std::max_element(limits.begin(), limits.end()) == 0;
      if (!absl::IsResourceExhausted(transfers_fit) || nothing_left) {
        return transfers_fit;
      }
      set_aside_bytes =
          std::max({2 * set_aside_bytes, job.transfer_bytes,
                    MostOffloadBytes(plan.step).value_or(0), int64_t{1}});
    }
  }

  static absl::StatusOr<StepPlan> PlanByBaseline(
      const PlannableJob& job, const semu::Batch& reference,
      const semu::Batch& batch, Baseline baseline,
      const std::atomic<bool>* cancelled) {
    StepPlan plan;
    const WallClock::time_point start = WallClock::now();
    PW_ASSIGN_OR_RETURN(BaselinePlan planned,
                        PlanBaseline(baseline, job.job, reference, batch,
                                     *job.costs, cancelled));
    plan.report.search_ns = NanosecondsSince(start);
    plan.report.strategy = std::string(BaselineName(baseline));
    plan.report.finished = true;
    plan.step = std::move(planned.step);
    plan.schedule = std::move(planned.schedule);
    const ProblemGraph graph = BuildProblemGraph(plan.step.problem);
    SetBounds(graph, &plan.report);
    WorkerPool pool(/*threads=*/1);
    PW_RETURN_IF_ERROR(Finish(job.job, batch,
                              WithLongItems(planned.memory, plan.step), graph,
                              pool, &plan));
    return plan;
  }

  static MemoryPlan MemoryOf(const PlannableJob& job, const StepProblem& step) {
    return WithLongItems({job.static_bytes, job.activation_limit_bytes,
                          job.transfer_bytes, job.layer_reserve_bytes},
                         step);
  }

  // With what the step's long items have set aside besides.
  static MemoryPlan WithLongItems(MemoryPlan memory, const StepProblem& step) {
    for (size_t r = 0; r < step.extra_reserve_bytes.size(); ++r) {
      const int64_t extra = step.extra_reserve_bytes[r];
      memory.static_bytes[r] += extra;
      memory.layer_reserve_bytes[r] += extra;
      memory.activation_limit_bytes[r] =
          std::max<int64_t>(0, memory.activation_limit_bytes[r] - extra);
    }
    return memory;
  }

  static void SetBounds(const ProblemGraph& graph, StepReport* report) {
    const LowerBounds bounds = FindLowerBounds(graph);
    report->lower_bound_ns = bounds.path_ns;
    report->flow_lower_bound_ns = bounds.flow_ns;
    report->layout_free_bound_ns = LayoutFreeBound(graph);
  }

  // Times, checks and lowers the schedule of `plan`, and completes its report.
  // RESOURCE_EXHAUSTED: transfers do not fit beside the activations.
  static absl::Status Finish(const semu::Job& job, const semu::Batch& batch,
                             const MemoryPlan& memory,
                             const ProblemGraph& graph, WorkerPool& pool,
                             StepPlan* finished) {
    StepPlan& plan = *finished;
    const Problem& problem = plan.step.problem;
    StepReport& report = plan.report;
    PW_ASSIGN_OR_RETURN(plan.times, TimeSchedule(graph, plan.schedule));

    ProgramLimits limits;
    for (const int64_t bytes : memory.activation_limit_bytes) {
      limits.memory_limit_bytes.push_back(bytes + memory.transfer_bytes);
    }
    limits.max_receives_ahead = job.executor.max_receives_ahead;
    absl::StatusOr<StepPrograms> programs = absl::UnknownError("");
    absl::Status schedule_checked, split_checked;
    pool.Run(2, [&](int, int index) {
      const WallClock::time_point start = WallClock::now();
      if (index == 0) {
        programs = Lower(plan.step, graph, plan.schedule, plan.times, limits);
        report.lower_ns = NanosecondsSince(start);
      } else {
        schedule_checked = CheckPlan(problem, plan.schedule, plan.times);
        split_checked = CheckCoverage(job, batch, plan.step);
        if (split_checked.ok()) split_checked = CheckSplit(plan.step);
        report.check_ns = NanosecondsSince(start);
        report.bubbles = FindBubbleCauses(graph, plan.schedule, plan.times);
      }
    });
    PW_RETURN_IF_ERROR(schedule_checked);
    PW_RETURN_IF_ERROR(programs.status());
    PW_RETURN_IF_ERROR(split_checked);
    plan.programs = *std::move(programs);

    absl::StatusOr<semu::EmulatedStep> emulated = absl::UnknownError("");
    absl::Status programs_checked;
    pool.Run(2, [&](int, int index) {
      const WallClock::time_point start = WallClock::now();
      if (index == 0) {
        emulated = PlanEvaluator::Predict(plan.step, graph, plan.programs,
                                          LinkSpeedsOf(job));
        report.lower_ns += NanosecondsSince(start);
      } else {
        programs_checked = CheckActions(plan.step, plan.programs, limits);
        report.check_ns += NanosecondsSince(start);
      }
    });
    PW_RETURN_IF_ERROR(programs_checked);
    PW_RETURN_IF_ERROR(emulated.status());
    PlanEvaluator::WriteTimes(*emulated, &plan.programs);

    report.makespan_ns = plan.programs.makespan_ns;
    report.schedule_makespan_ns = plan.times.makespan_ns;
    SetBubbles(*emulated, &report);
    report.measured_share = plan.step.measured_share;
    report.peak_memory_bytes.clear();
    for (size_t rank = 0; rank < memory.static_bytes.size(); ++rank) {
      report.peak_memory_bytes.push_back(memory.static_bytes[rank] -
                                         memory.transfer_bytes +
                                         plan.programs.peak_bytes[rank]);
    }
    return absl::OkStatus();
  }

  const std::shared_ptr<const semu::CostModel> costs_;
};

}  // namespace

std::unique_ptr<StepPlanner> MakeStepPlanner(
    std::shared_ptr<const semu::CostModel> costs) {
  return std::make_unique<Planner>(std::move(costs));
}

std::unique_ptr<StepPlanner> MakeStepPlanner() {
  return MakeStepPlanner(semu::MakeReusingOpGraphCost());
}

}  // namespace pipeweaver::search
