// Benchmark of planned steps on the paper's set-ups, as JSON lines.
//
//   paper_bench [PART ...] [--quick] [--batches N] [--budget-ms MS |
//               --budget-evals N] [--threads T] [--seed S]
//
// Parts, each by itself; all of them when none is named:
//   setups    the paper's five set-ups: gain over every baseline
//   ablation  vlm-s: from megatron to the planner, one idea at a time
//   trace     vlm-s: 40 steps whose images come and go
//   sizes     vlm-s: images of a sub-microbatch
//   scaling   search time against microbatches and ranks
//   layout    layouts proposed with and without sample batches against the
//             paper's rule, on fresh batches
//   replicas  every replica of vlm-xl and t2v-xl: planned apart, jointly, and
//             after microbatches moved between replicas
//   jitter    plans judged by expected makespan at 5 % noise
//
// Makespans are those of plans that both checkers passed, transfers contending.
// Baselines divide layers for a reference batch of 256 microbatches that is
// none of those planned. --quick takes about a minute for all parts.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "search/joint_planner.h"
#include "search/partition/layer_chain.h"
#include "search/partition/layer_partition.h"
#include "search/partition/layout_planner.h"
#include "search/partition/memory_plan.h"
#include "search/partition/step_problem_builder.h"
#include "search/plan/plan_checker.h"
#include "search/plan_evaluator.h"
#include "search/planner.h"
#include "search/problem/bound.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/registry.h"
#include "semu/base/check.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/module_graph.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr int kReferenceMicrobatches = 256;
constexpr uint64_t kReferenceSeed = 1000003;
constexpr const char* kPaperSetups[] = {"vlm-s", "vlm-m", "vlm-l", "t2v-s",
                                        "t2v-l"};

struct Options {
  bool quick = false;
  int batches = 100;
  int budget_ms = 50;
  int64_t budget_evaluations = 0;  // 0: by time
  int threads = 2;
  uint64_t seed = 1;

  int Batches() const { return quick ? 2 : batches; }
  int Microbatches() const { return quick ? 16 : 64; }
};

void Print(const Json& line) {
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
}

double Seconds(int64_t ns) { return static_cast<double>(ns) * 1e-9; }

double MillisecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start)
      .count();
}

// The planner's costs, each query simulated once.
const semu::CostModel& Costs() {
  static const std::shared_ptr<const semu::CostModel> costs =
      semu::MakeReusingOpGraphCost();
  return *costs;
}

// A set-up with what its batches are drawn from.
struct Setup {
  v1::Job proto;
  semu::Job job;
  std::shared_ptr<const PlannableJob> plannable;

  semu::Batch Sample(const semu::SampleOptions& options) const {
    return *semu::BatchFromProto(*semu::SampleBatch(proto, options), job);
  }
  // Other batches than those that are planned.
  std::vector<semu::Batch> LayoutSamples(const Options& options) const {
    constexpr uint64_t kFirstSeed = 1000103;
    std::vector<semu::Batch> samples;
    for (uint64_t i = 0; i < 6; ++i) {
      samples.push_back(Sample(
          {.seed = kFirstSeed + i, .microbatches = options.Microbatches()}));
    }
    return samples;
  }
  semu::Batch Reference() const {
    return Sample(
        {.seed = kReferenceSeed, .microbatches = kReferenceMicrobatches});
  }
};

Setup MakeSetup(const std::string& name) {
  Setup setup;
  setup.proto = *semu::MakeSetup(name);
  setup.job = *semu::JobFromProto(setup.proto);
  return setup;
}

SearchOptions MakeSearchOptions(const Options& options) {
  SearchOptions search;
  search.seed = options.seed;
  search.threads = options.threads;
  search.budget.evaluations = options.budget_evaluations;
  if (options.budget_evaluations == 0) {
    search.budget.deadline =
        Clock::now() + std::chrono::milliseconds(options.budget_ms);
  }
  return search;
}

// On a layout for batches like those that are planned.
std::shared_ptr<const PlannableJob> PrepareFor(const StepPlanner& planner,
                                               const Setup& setup,
                                               const Options& options) {
  const std::vector<semu::Batch> samples = setup.LayoutSamples(options);
  PrepareOptions prepare;
  prepare.samples = samples;
  prepare.threads = options.threads;
  return *planner.Prepare(setup.job, std::nullopt, prepare);
}

absl::StatusOr<StepReport> PlanOne(const StepPlanner& planner,
                                   const PlannableJob& job,
                                   const semu::Batch& batch,
                                   const std::string& strategy,
                                   const semu::Batch* reference,
                                   const Options& options) {
  PlanOptions plan_options;
  plan_options.strategy = strategy;
  plan_options.reference = reference;
  plan_options.search = MakeSearchOptions(options);
  absl::StatusOr<StepPlan> plan = planner.Plan(job, batch, plan_options);
  if (!plan.ok()) return plan.status();
  return std::move(plan->report);
}

Json Bubbles(const BubbleCauses& causes, double ranks) {
  const auto mean = [ranks](int64_t ns) { return Seconds(ns) / ranks; };
  return {{"imbalance", mean(causes.imbalance_ns)},
          {"dependency", mean(causes.dependency_ns)},
          {"memory", mean(causes.memory_ns)},
          {"transfer", mean(causes.transfer_ns)}};
}

// Sums over batches.
struct Sums {
  int batches = 0;
  double makespan_s = 0;
  double busy_s = 0;
  BubbleCauses bubbles;
  std::vector<double> gains;
  std::string error;  // of the last batch that was not planned

  void Add(const StepReport& report) {
    ++batches;
    const double makespan_s = Seconds(report.makespan_ns);
    this->makespan_s += makespan_s;
    busy_s += (1 - report.bubble_ratio) * makespan_s;
    bubbles.imbalance_ns += report.bubbles.imbalance_ns;
    bubbles.dependency_ns += report.bubbles.dependency_ns;
    bubbles.memory_ns += report.bubbles.memory_ns;
    bubbles.transfer_ns += report.bubbles.transfer_ns;
  }
};

// What of a baseline's longer step is not the planner's: rebuilt activations
// and lost efficiency (busier ranks), or idle time by its largest cause.
std::string LargestCause(const Json& difference) {
  std::string cause;
  double most = 0;
  for (const auto& [name, seconds] : difference.items()) {
    if (seconds.get<double>() > most) {
      most = seconds.get<double>();
      cause = name;
    }
  }
  return cause;
}

// --- setups

// What the paper reports over a baseline, and why ours need not be that.
struct PaperGain {
  const char* baseline;
  const char* note;
};
constexpr PaperGain kPaperGains[] = {
    {"megatron", "VPP by parameters, the paper's own baseline"},
    {"interleaved-1f1b",
     "not in the paper: layers divided by time, which is stronger than "
     "megatron"},
    {"nnscaler*",
     "ours searches chain, order and recompute on the emulator that judges it"},
    {"optimus*",
     "ours takes the best of several bubble-filling rules for each batch; the "
     "paper has it for VLM only"},
};

void RunSetups(const StepPlanner& planner, const Options& options) {
  for (const std::string name : kPaperSetups) {
    Setup setup = MakeSetup(name);
    setup.plannable = PrepareFor(planner, setup, options);
    const semu::Batch reference = setup.Reference();
    const double ranks = setup.job.parallelism.pipeline_parallel;
    std::vector<std::string> strategies = planner.StrategyNames();
    std::map<std::string, Sums> sums;
    for (int b = 0; b < options.Batches(); ++b) {
      const semu::Batch batch = setup.Sample(
          {.seed = options.seed + b, .microbatches = options.Microbatches()});
      double first_s = 0;
      for (const std::string& strategy : strategies) {
        Sums& sum = sums[strategy];
        const auto report = PlanOne(planner, *setup.plannable, batch, strategy,
                                    &reference, options);
        if (!report.ok()) {
          PW_CHECK(strategy != strategies[0]);
          sum.error = std::string(report.status().message());
          continue;
        }
        sum.Add(*report);
        if (strategy == strategies[0]) first_s = Seconds(report->makespan_ns);
        sum.gains.push_back(Seconds(report->makespan_ns) / first_s - 1);
      }
    }
    const Sums& ours = sums[strategies[0]];
    for (const std::string& strategy : strategies) {
      const Sums& sum = sums[strategy];
      Json line = {{"bench", "setups"},
                   {"setup", name},
                   {"strategy", strategy},
                   {"microbatches", options.Microbatches()},
                   {"batches", sum.batches}};
      if (sum.batches > 0) {
        const double n = sum.batches;
        line["mean_makespan_s"] = sum.makespan_s / n;
        double mean = 0;
        for (const double gain : sum.gains) mean += gain / n;
        line["planner_gain_mean"] = mean;
        const auto [least, most] =
            std::minmax_element(sum.gains.begin(), sum.gains.end());
        line["planner_gain_least"] = *least;
        line["planner_gain_most"] = *most;
        // Mean seconds of a rank a step more than the planner's.
        Json more = {{"compute", sum.busy_s / n - ours.busy_s / ours.batches}};
        const Json theirs = Bubbles(sum.bubbles, ranks * n);
        const Json own = Bubbles(ours.bubbles, ranks * ours.batches);
        for (const auto& [cause, seconds] : theirs.items()) {
          more[cause] = seconds.get<double>() - own[cause].get<double>();
        }
        if (strategy != strategies[0]) {
          line["longer_by_s"] = more;
          line["mostly"] = LargestCause(more);
        }
      }
      if (!sum.error.empty()) line["error"] = sum.error;
      for (const PaperGain& paper : kPaperGains) {
        if (strategy != paper.baseline) continue;
        line["paper_gain"] = name.starts_with("vlm") ? "+15.6 % to +76.2 %"
                                                     : "+36.6 % to +97.3 %";
        line["note"] = paper.note;
      }
      Print(line);
    }
  }
}

// --- ablation

// A plan of the ablation, checked; its schedule's makespan, or why there is
// none.
absl::StatusOr<int64_t> Judge(const Problem& problem,
                              const Schedule& schedule) {
  absl::StatusOr<CheckedSchedule> checked = CheckSchedule(problem, schedule);
  if (!checked.ok()) return checked.status();
  return checked->times.makespan_ns;
}

// Each module cut by time into the paper's number of segments, whole
// microbatches, interleaved 1F1B over the segments; the fastest strategy that
// fits.
absl::StatusOr<int64_t> PartitionerOnly(const Setup& setup,
                                        const semu::Batch& reference,
                                        const semu::Batch& batch) {
  const semu::CostModel& costs = Costs();
  const int ranks = setup.job.parallelism.pipeline_parallel;
  const LayoutShape shape = *PaperLayoutShape(setup.job, costs);
  const LayerTimes times = *MeanLayerTimes(setup.job, reference, costs);
  const std::vector<int> modules = semu::TopologicalOrder(setup.job);
  std::vector<int> cut;
  for (const int m : modules) {
    const std::vector<int> lengths =
        PartitionLayers(times[m], ranks * shape.modules[m].segments);
    cut.insert(cut.end(), lengths.begin(), lengths.end());
  }
  const Chain chain = MakeChain(setup.job, modules, cut, false);
  const int microbatches = static_cast<int>(batch.microbatches.size());
  std::vector<std::vector<ChainTurn>> orders;
  orders.reserve(ranks);
  for (int r = 0; r < ranks; ++r) {
    orders.push_back(ChainOrder(ChainRule::k1f1b, ranks, r, microbatches,
                                chain.virtual_stages));
  }
  const auto memory = PlanMemory(setup.job, chain.layout, costs);
  if (!memory.ok()) return memory.status();
  absl::Status failure;
  for (const semu::MemoryStrategy strategy : UniformStrategies(setup.job)) {
    const auto step = BuildStepProblem(
        setup.job, chain.layout, memory->activation_limit_bytes, batch, costs,
        {.strategy = strategy, .split_backward = false});
    if (!step.ok()) return step.status();
    const auto makespan = Judge(
        step->problem, ChainSchedule(setup.job, chain, *step,
                                     BuildProblemGraph(step->problem), orders));
    if (makespan.ok()) return makespan;
    failure = makespan.status();
  }
  return failure;
}

// `strategy` on a layout; with one memory strategy for all layers, the best of
// those that fit, unless `memory_choices`.
absl::StatusOr<int64_t> OnLayout(const Setup& setup, const semu::Layout& layout,
                                 const semu::Batch& batch,
                                 const std::string& strategy,
                                 int64_t most_evals, bool memory_choices,
                                 bool split, const Options& options) {
  const semu::CostModel& costs = Costs();
  const auto memory = PlanMemory(setup.job, layout, costs);
  if (!memory.ok()) return memory.status();
  std::vector<std::optional<semu::MemoryStrategy>> strategies;
  if (memory_choices) {
    strategies = {std::nullopt};
  } else {
    for (const auto uniform : UniformStrategies(setup.job)) {
      strategies.emplace_back(uniform);
    }
  }
  absl::StatusOr<int64_t> best = absl::ResourceExhaustedError("nothing fits");
  for (const auto& uniform : strategies) {
    const auto step = BuildStepProblem(
        setup.job, layout, memory->activation_limit_bytes, batch, costs,
        {.strategy = uniform, .split_backward = split});
    if (!step.ok()) return step.status();
    SearchOptions search = MakeSearchOptions(options);
    if (most_evals > 0) {
      search.budget.evaluations = most_evals;
      search.budget.deadline.reset();
    }
    const auto result =
        MakeStrategy(strategy)->Solve(BuildProblemGraph(step->problem), search);
    if (!result.ok()) {
      if (!best.ok()) best = result.status();
      continue;
    }
    const auto makespan = Judge(step->problem, result->schedule);
    if (!makespan.ok()) return makespan.status();
    if (!best.ok() || *makespan < *best) best = *makespan;
  }
  return best;
}

void RunAblation(const StepPlanner& planner, const Options& options) {
  Setup setup = MakeSetup("vlm-s");
  setup.plannable = PrepareFor(planner, setup, options);
  const semu::CostModel& costs = Costs();
  const semu::Layout paper_layout = *PlanLayout(setup.job, costs);
  const semu::Batch reference = setup.Reference();
  struct Step {
    const char* name;
    std::optional<double> paper_s;
    double sum_s = 0;
    int batches = 0;
  };
  Step steps[] = {{"megatron", 26.13},
                  {"+ partitioner", 22.27},
                  {"+ interleaving", 18.81},
                  {"+ reordering", 17.61},
                  {"+ memory", 16.05},
                  {"+ split backward", std::nullopt},
                  {"+ refined layout", std::nullopt}};
  const int batches = std::min(options.Batches(), 20);
  for (int b = 0; b < batches; ++b) {
    const semu::Batch batch = setup.Sample(
        {.seed = options.seed + b, .microbatches = options.Microbatches()});
    const auto megatron = PlanOne(planner, *setup.plannable, batch, "megatron",
                                  &reference, options);
    const auto on_paper_layout = [&](const char* strategy, int64_t evals,
                                     bool memory_choices, bool split) {
      return OnLayout(setup, paper_layout, batch, strategy, evals,
                      memory_choices, split, options);
    };
    const absl::StatusOr<int64_t> makespans[] = {
        megatron.ok() ? absl::StatusOr<int64_t>(megatron->schedule_makespan_ns)
                      : megatron.status(),
        PartitionerOnly(setup, reference, batch),
        on_paper_layout("list", 1, false, false),
        on_paper_layout("portfolio", 0, false, false),
        on_paper_layout("portfolio", 0, true, false),
        on_paper_layout("portfolio", 0, true, true),
        OnLayout(setup, setup.plannable->layout, batch, "portfolio", 0, true,
                 true, options)};
    for (size_t i = 0; i < std::size(steps); ++i) {
      if (!makespans[i].ok()) continue;
      steps[i].sum_s += Seconds(*makespans[i]);
      ++steps[i].batches;
    }
  }
  for (const Step& step : steps) {
    Json line = {{"bench", "ablation"},
                 {"setup", "vlm-s"},
                 {"step", step.name},
                 {"batches", step.batches}};
    if (step.batches > 0) line["mean_makespan_s"] = step.sum_s / step.batches;
    if (step.paper_s) line["paper_makespan_s"] = *step.paper_s;
    Print(line);
  }
}

// --- trace

void RunTrace(const StepPlanner& planner, const Options& options) {
  Setup setup = MakeSetup("vlm-s");
  setup.plannable = PrepareFor(planner, setup, options);
  const semu::Batch reference = setup.Reference();
  const int steps = options.quick ? 6 : 40;
  for (int step = 1; step <= steps; ++step) {
    semu::SampleOptions sample = {.seed = options.seed + step,
                                  .microbatches = options.Microbatches()};
    semu::SetTraceBounds(step, &sample);
    const semu::Batch batch = setup.Sample(sample);
    Json line = {{"bench", "trace"},
                 {"setup", "vlm-s"},
                 {"step", step},
                 {"min_images", sample.min_images},
                 {"max_images", sample.max_images}};
    for (const char* strategy : {"portfolio", "megatron", "interleaved-1f1b",
                                 "nnscaler*", "optimus*"}) {
      const auto report = PlanOne(planner, *setup.plannable, batch, strategy,
                                  &reference, options);
      line[strategy] =
          report.ok() ? Json(Seconds(report->makespan_ns)) : Json();
    }
    Print(line);
  }
}

// --- sizes

void RunSizes(const StepPlanner& planner, const Options& options) {
  Setup setup = MakeSetup("vlm-s");
  const semu::CostModel& costs = Costs();
  const int vision = semu::RolesOf(setup.proto)->vision;
  constexpr int64_t kImageTokens = 52 * 52;
  const semu::Layout paper_layout = *PlanLayout(setup.job, costs);
  const int batches = std::min(options.Batches(), 10);
  for (const int images : {1, 2, 4, 6, 8, 12, 16, 24, 48}) {
    semu::Layout layout = paper_layout;
    layout.modules[vision].sub_microbatch_tokens = images * kImageTokens;
    const auto plannable = planner.Prepare(setup.job, layout, {});
    if (!plannable.ok()) continue;
    double makespan_s = 0, bound_s = 0, compute_s = 0, stages = 0;
    for (int b = 0; b < batches; ++b) {
      PlanOptions plan_options;
      plan_options.search = MakeSearchOptions(options);
      const auto plan =
          planner.Plan(**plannable,
                       setup.Sample({.seed = options.seed + b,
                                     .microbatches = options.Microbatches()}),
                       plan_options);
      PW_CHECK(plan.ok());
      makespan_s += Seconds(plan->report.makespan_ns) / batches;
      bound_s += Seconds(plan->report.lower_bound_ns) / batches;
      compute_s += Seconds(plan->report.layout_free_bound_ns) / batches;
      for (const auto& rank : plan->schedule.ranks) {
        stages += static_cast<double>(rank.size()) / batches;
      }
    }
    Print({{"bench", "sizes"},
           {"setup", "vlm-s"},
           {"images", images},
           {"batches", batches},
           {"mean_makespan_s", makespan_s},
           {"mean_bound_s", bound_s},
           {"mean_compute_s", compute_s},
           {"mean_stages", stages}});
  }
}

// --- scaling

void RunScaling(const Options& options) {
  const semu::CostModel& costs = Costs();
  const auto measure = [&](int ranks, int microbatches) {
    Setup setup = MakeSetup("vlm-s");
    setup.job.parallelism.pipeline_parallel = ranks;
    const semu::Layout layout = *PlanLayout(setup.job, costs);
    const auto memory = PlanMemory(setup.job, layout, costs);
    PW_CHECK(memory.ok());
    const semu::Batch batch =
        setup.Sample({.seed = options.seed, .microbatches = microbatches});
    const Clock::time_point start = Clock::now();
    const auto step = BuildStepProblem(
        setup.job, layout, memory->activation_limit_bytes, batch, costs);
    PW_CHECK(step.ok());
    const double build_ms = MillisecondsSince(start);
    const ProblemGraph graph = BuildProblemGraph(step->problem);
    Json line = {{"bench", "scaling"},
                 {"setup", "vlm-s"},
                 {"ranks", ranks},
                 {"microbatches", microbatches},
                 {"stage_pairs", graph.pairs},
                 {"build_ms", build_ms}};
    const double bound_ns = static_cast<double>(LowerBound(graph));
    for (const int64_t evaluations : {1, 64}) {
      SearchOptions search;
      search.seed = options.seed;
      search.threads = options.threads;
      search.budget.evaluations = evaluations;
      const Clock::time_point search_start = Clock::now();
      const auto result = MakeStrategy("portfolio")->Solve(graph, search);
      const double ms = MillisecondsSince(search_start);
      const std::string evals = absl::StrCat("_", evaluations, "_evals");
      line["search_ms" + evals] = ms;
      if (!result.ok()) {
        line["error"] = std::string(result.status().message());
        break;
      }
      line["gap" + evals] =
          static_cast<double>(result->makespan_ns) / bound_ns - 1;
    }
    Print(line);
  };
  for (int microbatches = 4; microbatches <= (options.quick ? 64 : 1024);
       microbatches *= 2) {
    measure(4, microbatches);
  }
  for (int ranks = 2; ranks <= (options.quick ? 16 : 64); ranks *= 2) {
    measure(ranks, 64);
  }
}

// --- layout

void RunLayout(const StepPlanner& planner, const Options& options) {
  std::vector<std::string> names(std::begin(kPaperSetups),
                                 std::end(kPaperSetups));
  if (!options.quick) {
    names.insert(names.end(), {"vlm-s-h20", "vlm-xl", "t2v-xl", "omni"});
  }
  const int batches = std::min(options.Batches(), 10);
  for (const std::string& name : names) {
    const Setup setup = MakeSetup(name);
    Json line = {{"bench", "layout"}, {"setup", name}, {"batches", batches}};
    const auto measure = [&](const std::string& column,
                             const std::optional<semu::Layout>& pinned,
                             const PrepareOptions& prepare) {
      const Clock::time_point start = Clock::now();
      const auto prepared = planner.Prepare(setup.job, pinned, prepare);
      if (!prepared.ok()) {
        line[column + "_error"] = std::string(prepared.status().message());
        return;
      }
      line[column + "_prepare_s"] =
          std::chrono::duration<double>(Clock::now() - start).count();
      double makespan_s = 0, stages = 0;
      for (int b = 0; b < batches; ++b) {
        PlanOptions plan_options;
        plan_options.search = MakeSearchOptions(options);
        const auto plan =
            planner.Plan(**prepared,
                         setup.Sample({.seed = options.seed + b,
                                       .microbatches = options.Microbatches()}),
                         plan_options);
        PW_CHECK(plan.ok());
        makespan_s += Seconds(plan->report.makespan_ns) / batches;
        for (const auto& rank : plan->schedule.ranks) {
          stages += static_cast<double>(rank.size()) / batches;
        }
      }
      line[column + "_makespan_s"] = makespan_s;
      line[column + "_stages"] = stages;
    };
    measure("paper", *PlanLayout(setup.job, Costs()), {});
    measure("made_up", std::nullopt, {});
    const std::vector<semu::Batch> samples = setup.LayoutSamples(options);
    PrepareOptions prepare;
    prepare.samples = samples;
    prepare.threads = options.threads;
    measure("samples", std::nullopt, prepare);
    Print(line);
  }
}

// --- replicas

void RunReplicas(const StepPlanner& planner, const Options& options) {
  for (const std::string name : {"vlm-xl", "t2v-xl"}) {
    Setup setup = MakeSetup(name);
    setup.plannable = PrepareFor(planner, setup, options);
    const int replicas =
        options.quick ? 4 : setup.job.parallelism.data_parallel;
    std::vector<semu::Batch> batches;
    batches.reserve(replicas);
    for (int r = 0; r < replicas; ++r) {
      batches.push_back(setup.Sample(
          {.seed = options.seed + r, .microbatches = options.Microbatches()}));
    }
    const auto pointers_to = [](const std::vector<semu::Batch>& all) {
      std::vector<const semu::Batch*> pointers;
      pointers.reserve(all.size());
      for (const semu::Batch& batch : all) pointers.push_back(&batch);
      return pointers;
    };
    const auto print = [&](const char* mode, double wall_ms,
                           const std::vector<absl::StatusOr<StepPlan>>& plans) {
      double slowest_s = 0, mean_s = 0, bound_s = 0;
      int64_t evaluations = 0;
      for (const auto& plan : plans) {
        PW_CHECK(plan.ok());
        const StepReport& report = plan->report;
        slowest_s = std::max(slowest_s, Seconds(report.makespan_ns));
        bound_s = std::max(bound_s, Seconds(report.lower_bound_ns));
        mean_s += Seconds(report.makespan_ns) / replicas;
        evaluations += report.evaluations;
      }
      Print({{"bench", "replicas"},
             {"setup", name},
             {"mode", mode},
             {"replicas", replicas},
             {"slowest_makespan_s", slowest_s},
             {"mean_makespan_s", mean_s},
             {"largest_bound_s", bound_s},
             {"evaluations", evaluations},
             {"wall_ms", wall_ms}});
    };
    const auto jointly = [&](const char* mode,
                             const std::vector<semu::Batch>& all) {
      PlanOptions plan_options;
      plan_options.search = MakeSearchOptions(options);
      SearchBudget& budget = plan_options.search.budget;
      budget.evaluations *= replicas;
      if (budget.deadline) {
        budget.deadline = Clock::now() + replicas * std::chrono::milliseconds(
                                                        options.budget_ms);
      }
      const Clock::time_point start = Clock::now();
      const auto plans = PlanJointly(planner, *setup.plannable,
                                     pointers_to(all), plan_options);
      print(mode, MillisecondsSince(start), plans);
    };

    const Clock::time_point start = Clock::now();
    std::vector<absl::StatusOr<StepPlan>> apart;
    for (const semu::Batch& batch : batches) {
      PlanOptions plan_options;
      plan_options.search = MakeSearchOptions(options);
      apart.push_back(planner.Plan(*setup.plannable, batch, plan_options));
    }
    print("apart", MillisecondsSince(start), apart);
    jointly("jointly", batches);
    jointly(
        "jointly, microbatches moved",
        ApplyMoves(pointers_to(batches),
                   *EvenOutReplicas(setup.job, pointers_to(batches), Costs())));
  }
}

// --- learning across steps

// Steps one after the other, each planned on its own and from the settings that
// the one before ended on.
void RunLearning(const StepPlanner& planner, const Options& options) {
  const int batches = std::min(options.Batches(), 20);
  for (const std::string name : kPaperSetups) {
    Setup setup = MakeSetup(name);
    setup.plannable = PrepareFor(planner, setup, options);
    // [learning]: means over all steps but the first.
    double gap[2] = {}, flow_gap[2] = {};
    std::vector<int32_t> settings;
    for (int b = 0; b < batches; ++b) {
      const semu::Batch batch = setup.Sample(
          {.seed = options.seed + b, .microbatches = options.Microbatches()});
      for (const int learning : {0, 1}) {
        PlanOptions plan_options;
        plan_options.search = MakeSearchOptions(options);
        if (learning) plan_options.search.warm_settings = settings;
        const auto plan = planner.Plan(*setup.plannable, batch, plan_options);
        PW_CHECK(plan.ok());
        if (learning) settings = plan->settings;
        if (b == 0) continue;
        const double makespan =
            static_cast<double>(plan->report.schedule_makespan_ns);
        gap[learning] +=
            (makespan / static_cast<double>(plan->report.lower_bound_ns) - 1) /
            (batches - 1);
        flow_gap[learning] +=
            (makespan / static_cast<double>(plan->report.flow_lower_bound_ns) -
             1) /
            (batches - 1);
      }
    }
    Print({{"bench", "learning"},
           {"setup", name},
           {"microbatches", options.Microbatches()},
           {"steps", batches},
           {"gap_apart", gap[0]},
           {"gap_learning", gap[1]},
           {"flow_gap_apart", flow_gap[0]},
           {"flow_gap_learning", flow_gap[1]}});
  }
}

// --- jitter

void RunJitter(const StepPlanner& planner, const Options& options) {
  constexpr double kNoise = 0.05;
  constexpr int kRuns = 64;
  const int batches = std::min(options.Batches(), 10);
  for (const std::string name : kPaperSetups) {
    Setup setup = MakeSetup(name);
    setup.plannable = PrepareFor(planner, setup, options);
    // [judged by expectation]: means over batches.
    double predicted_s[2] = {}, expected_s[2] = {}, wall_ms[2] = {};
    for (int b = 0; b < batches; ++b) {
      const semu::Batch batch = setup.Sample(
          {.seed = options.seed + b, .microbatches = options.Microbatches()});
      for (const int judged : {0, 1}) {
        PlanOptions plan_options;
        plan_options.search = MakeSearchOptions(options);
        if (judged) plan_options.jitter.duration_noise = kNoise;
        const Clock::time_point start = Clock::now();
        const auto plan = planner.Plan(*setup.plannable, batch, plan_options);
        PW_CHECK(plan.ok());
        wall_ms[judged] += MillisecondsSince(start) / batches;
        predicted_s[judged] += Seconds(plan->report.makespan_ns) / batches;
        // Other noise than the plan was judged by.
        const PlanEvaluator evaluator(plan->step, plan->programs,
                                      LinkSpeedsOf(setup.job));
        for (int run = 0; run < kRuns; ++run) {
          const auto evaluation =
              evaluator.Evaluate({.duration_noise = kNoise,
                                  .seed = 100000 + static_cast<uint64_t>(run)});
          PW_CHECK(evaluation.ok());
          expected_s[judged] +=
              Seconds(evaluation->makespan_ns) / (kRuns * batches);
        }
      }
    }
    Print({{"bench", "jitter"},
           {"setup", name},
           {"batches", batches},
           {"noise", kNoise},
           {"predicted_s", predicted_s[0]},
           {"expected_s", expected_s[0]},
           {"wall_ms", wall_ms[0]},
           {"judged_predicted_s", predicted_s[1]},
           {"judged_expected_s", expected_s[1]},
           {"judged_wall_ms", wall_ms[1]},
           {"gain", expected_s[0] / expected_s[1] - 1}});
  }
}

int Main(int argc, char** argv) {
  CLI::App app("Benchmark of planned steps on the paper's set-ups.");
  Options options;
  std::vector<std::string> parts;
  const std::vector<std::string> all = {"setups",   "ablation", "trace",
                                        "sizes",    "scaling",  "layout",
                                        "replicas", "jitter",   "learning"};
  app.add_option("PART", parts, "default: all")->check(CLI::IsMember(all));
  app.add_flag("--quick", options.quick,
               "2 batches of 16 microbatches, smaller sweeps");
  app.add_option("--batches", options.batches)->check(CLI::Range(1, 10000));
  app.add_option("--budget-ms", options.budget_ms, "of each search")
      ->check(CLI::Range(1, 60000));
  app.add_option("--budget-evals", options.budget_evaluations,
                 "of each search, in place of time")
      ->check(CLI::Range(1, 1000000000));
  app.add_option("--threads", options.threads)->check(CLI::Range(1, 256));
  app.add_option("--seed", options.seed, "of the first batch");
  CLI11_PARSE(app, argc, argv);
  if (parts.empty()) parts = all;
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  for (const std::string& part : parts) {
    if (part == "setups") RunSetups(*planner, options);
    if (part == "ablation") RunAblation(*planner, options);
    if (part == "trace") RunTrace(*planner, options);
    if (part == "sizes") RunSizes(*planner, options);
    if (part == "scaling") RunScaling(options);
    if (part == "layout") RunLayout(*planner, options);
    if (part == "replicas") RunReplicas(*planner, options);
    if (part == "jitter") RunJitter(*planner, options);
    if (part == "learning") RunLearning(*planner, options);
  }
  return 0;
}

}  // namespace
}  // namespace pipeweaver::search

int main(int argc, char** argv) { return pipeweaver::search::Main(argc, argv); }
