// Benchmark of the search, as JSON lines.
//
//   search_bench gaps [--strategy NAME] [--threads T] PROBLEM.json[.gz] ...
//     one line per problem and budget of 2, 10, 50, 250 and 1000 ms: gap to the
//     lower bound and to the flow bound, wall and processor time; then one per
//     family of files and budget with the mean gaps
//   search_bench scaling [--threads T]
//     time to the first plan on pipelines of 2 to 64 ranks and 4 to 1024
//     microbatches, and a fit of time = a * n * log2(n) over n stages: the
//     residuals' slope in log-log space tells how much faster time grows
//
// Files are parsed before time is taken; problems start in memory.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <memory>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "search/problem/bound.h"
#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/problem/problem_json.h"
#include "search/strategy/registry.h"
#include "search/strategy/strategy.h"
#include "semu/base/text_source.h"

namespace pipeweaver::search {
namespace {

using Clock = std::chrono::steady_clock;

struct Run {
  bool solved = false;
  double makespan_ns = 0;
  double wall_ms = 0;
  double processor_ms = 0;
  int64_t evaluations = 0;
};

Run Solve(const Strategy& strategy, const Problem& problem,
          const SearchBudget& budget, int threads) {
  SearchOptions options;
  options.budget = budget;
  options.threads = threads;
  const Clock::time_point start = Clock::now();
  const std::clock_t processor = std::clock();
  const absl::StatusOr<SearchResult> result =
      strategy.Solve(BuildProblemGraph(problem), options);
  Run run;
  run.wall_ms =
      std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  run.processor_ms =
      1e3 * static_cast<double>(std::clock() - processor) / CLOCKS_PER_SEC;
  run.solved = result.ok();
  if (result.ok()) {
    run.makespan_ns = static_cast<double>(result->makespan_ns);
    run.evaluations = result->evaluations;
  }
  return run;
}

// Of a problem file: its name without what tells members apart, a number or
// sizes as in "-p8-m32".
std::string Family(const std::string& name) {
  static const std::regex kMember("(-p[0-9]+-m[0-9]+.*|-[0-9]+)?[.]json.*");
  return std::regex_replace(name, kMember, "");
}

// False where a file could not be read, or a problem not be solved.
bool Gaps(const Strategy& strategy, int threads,
          const std::vector<std::string>& paths) {
  struct Sums {
    int files = 0;
    double gap = 0, flow_gap = 0;
  };
  std::map<std::pair<std::string, int>, Sums> families;  // and budget
  bool all_good = true;
  for (const std::string& path : paths) {
    const absl::StatusOr<std::string> text = ReadTextFile(path, 1 << 30);
    const absl::StatusOr<Problem> problem =
        text.ok() ? ParseProblemJson(*text) : text.status();
    if (!problem.ok()) {
      std::fprintf(stderr, "%s: %s\n", path.c_str(),
                   std::string(problem.status().message()).c_str());
      all_good = false;
      continue;
    }
    const std::string name = path.substr(path.rfind('/') + 1);
    const ProblemGraph graph = BuildProblemGraph(*problem);
    const double bound = static_cast<double>(LowerBound(graph));
    const double flow = static_cast<double>(FlowLowerBound(graph));
    for (const int budget_ms : {2, 10, 50, 250, 1000}) {
      SearchBudget budget;
      budget.deadline = Clock::now() + std::chrono::milliseconds(budget_ms);
      const Run run = Solve(strategy, *problem, budget, threads);
      if (!run.solved) {
        std::fprintf(stderr, "%s: not solved\n", path.c_str());
        all_good = false;
        continue;
      }
      Sums& sums = families[{Family(name), budget_ms}];
      ++sums.files;
      sums.gap += run.makespan_ns / bound - 1;
      sums.flow_gap += run.makespan_ns / flow - 1;
      std::printf(
          "{\"bench\": \"gaps\", \"strategy\": \"%s\", \"problem\": %s, "
          "\"budget_ms\": %d, \"threads\": %d, \"gap\": %.5f, \"flow_gap\": "
          "%.5f, \"makespan_ns\": %.0f, \"evaluations\": %lld, \"wall_ms\": "
          "%.2f, \"processor_ms\": %.2f}\n",
          std::string(strategy.name()).c_str(), JsonString(name).c_str(),
          budget_ms, threads, run.makespan_ns / bound - 1,
          run.makespan_ns / flow - 1, run.makespan_ns,
          static_cast<long long>(run.evaluations), run.wall_ms,
          run.processor_ms);
      std::fflush(stdout);
    }
  }
  for (const auto& [key, sums] : families) {
    const auto& [family, budget_ms] = key;
    std::printf(
        "{\"bench\": \"gaps_by_family\", \"strategy\": \"%s\", \"family\": "
        "%s, \"files\": %d, \"budget_ms\": %d, \"gap\": %.5f, \"flow_gap\": "
        "%.5f}\n",
        std::string(strategy.name()).c_str(), JsonString(family).c_str(),
        sums.files, budget_ms, sums.gap / sums.files,
        sums.flow_gap / sums.files);
  }
  return all_good;
}

// Equal microbatches over all ranks, split backward, memory for a pipeline's
// depth.
Problem Pipeline(int ranks, int microbatches) {
  Problem problem;
  problem.ranks = ranks;
  problem.split_backward = true;
  problem.memory_limit_bytes.assign(ranks, 2 * ranks);
  for (int m = 0; m < microbatches; ++m) {
    Sweep sweep;
    sweep.id = std::to_string(m);
    sweep.microbatch = m;
    Choice choice;
    choice.forward_ns = choice.input_grad_ns = choice.weight_grad_ns =
        100000 + 1000 * (m % 7);
    choice.activation_bytes = choice.backward_bytes = choice.weight_grad_bytes =
        1;
    for (int r = 0; r < ranks; ++r) {
      sweep.stages.push_back(
          {.rank = r, .transfer_ns = 5000, .choices = {choice}});
    }
    problem.sweeps.push_back(std::move(sweep));
  }
  return problem;
}

void Scaling(const Strategy& strategy, int threads) {
  constexpr int kRepeats = 5;
  std::vector<double> log_n, log_ratio;
  double sum_xy = 0, sum_xx = 0;
  for (const int ranks : {2, 4, 8, 16, 32, 64}) {
    for (const int microbatches : {4, 16, 64, 128, 256, 1024}) {
      const Problem problem = Pipeline(ranks, microbatches);
      std::vector<double> times;
      for (int i = 0; i < kRepeats; ++i) {
        SearchBudget budget;
        budget.evaluations = 1;
        times.push_back(Solve(strategy, problem, budget, threads).processor_ms);
      }
      std::sort(times.begin(), times.end());
      const double ms = times[kRepeats / 2];
      const double n = 3.0 * ranks * microbatches;
      const double x = n * std::log2(n);
      sum_xy += x * ms;
      sum_xx += x * x;
      if (ms > 0.05) {
        log_n.push_back(std::log(n));
        log_ratio.push_back(std::log(ms / x));
      }
      std::printf(
          "{\"bench\": \"scaling\", \"ranks\": %d, \"microbatches\": %d, "
          "\"stages\": %.0f, \"first_plan_ms\": %.3f}\n",
          ranks, microbatches, n, ms);
      std::fflush(stdout);
    }
  }
  double mean_x = 0, mean_y = 0, xy = 0, xx = 0;
  for (size_t i = 0; i < log_n.size(); ++i) {
    mean_x += log_n[i] / static_cast<double>(log_n.size());
    mean_y += log_ratio[i] / static_cast<double>(log_n.size());
  }
  for (size_t i = 0; i < log_n.size(); ++i) {
    xy += (log_n[i] - mean_x) * (log_ratio[i] - mean_y);
    xx += (log_n[i] - mean_x) * (log_n[i] - mean_x);
  }
  std::printf(
      "{\"bench\": \"scaling_fit\", \"model\": \"a * n * log2(n)\", "
      "\"a_ns\": %.3f, \"residual_exponent\": %.3f}\n",
      1e6 * sum_xy / sum_xx, xx > 0 ? xy / xx : 0);
}

int Main(int argc, char** argv) {
  std::string mode, name = "portfolio";
  int threads = 2;
  std::vector<std::string> paths;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--strategy" && i + 1 < argc) {
      name = argv[++i];
    } else if (arg == "--threads" && i + 1 < argc) {
      threads = std::max(1, std::atoi(argv[++i]));
    } else if (mode.empty()) {
      mode = arg;
    } else {
      paths.push_back(arg);
    }
  }
  const std::unique_ptr<Strategy> strategy = MakeStrategy(name);
  if (strategy == nullptr || (mode != "gaps" && mode != "scaling") ||
      paths.empty() == (mode == "gaps")) {
    std::fprintf(stderr,
                 "usage: search_bench gaps [--strategy NAME] [--threads T] "
                 "PROBLEM ... | search_bench scaling [--strategy NAME] "
                 "[--threads T]\n");
    return 2;
  }
  if (mode == "gaps") return Gaps(*strategy, threads, paths) ? 0 : 1;
  Scaling(*strategy, threads);
  return 0;
}

}  // namespace
}  // namespace pipeweaver::search

int main(int argc, char** argv) { return pipeweaver::search::Main(argc, argv); }
