#include "server/ctl/search_flags.h"

#include <chrono>
#include <limits>

#include "server/ctl/command.h"

namespace pipeweaver::ctl {
namespace {

constexpr uint64_t kMostMs = 86'400'000;  // a day
constexpr uint64_t kMostEvaluations = 1'000'000'000'000;
constexpr uint64_t kMostThreads = 256;

}  // namespace

void SearchFlags::AddTo(CLI::App& app) {
  app.add_option("--seed", seed, "of all that is drawn at random")
      ->transform(WholeNumber(0, std::numeric_limits<uint64_t>::max()))
      ->capture_default_str();
  CLI::Option* evals =
      app.add_option("--budget-evals", budget_evals,
                     "schedules to evaluate; fixes the plan's bytes")
          ->transform(WholeNumber(1, kMostEvaluations));
  app.add_option("--budget-ms", budget_ms, "time of the search")
      ->transform(WholeNumber(1, kMostMs))
      ->capture_default_str()
      ->excludes(evals);
  app.add_option("--threads", threads, "of the search")
      ->transform(WholeNumber(1, kMostThreads))
      ->capture_default_str();
}

search::SearchOptions SearchFlags::Options() const {
  search::SearchOptions options;
  options.seed = seed;
  options.threads = threads;
  options.budget.evaluations = budget_evals;
  if (budget_evals == 0) {
    options.budget.deadline =
        std::chrono::steady_clock::now() + std::chrono::milliseconds(budget_ms);
  }
  return options;
}

}  // namespace pipeweaver::ctl
