// What the portfolio strategy does beyond what all strategies must
// (conformance_test.cc).

#include "search/strategy/portfolio.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/order_times.h"
#include "search/strategy/pipeline_rule.h"
#include "search/strategy/strategy.h"
#include "search/strategy/testing/random_models.h"

namespace pipeweaver::search {
namespace {

TEST(PortfolioTest, SettingsThatWereScheduledTwiceAreSoAgain) {
  constexpr uint64_t kSeeds = 200;
  int better = 0;
  ForEachRandomModel(kSeeds, [&](const ProblemGraph& graph, const SafePlan&,
                                 const ListModel& model) {
    const PipelineRules rules(model);
    PipelineRule rule = rules.FirstRules().back();
    rule.twice = rule.holds_back = true;
    ListScheduler scheduler(model);
    ListRule list;
    Ways ways;
    TaskOrder plain, once, twice;
    rules.Build(rules.FirstRules().front(), list, ways);
    scheduler.Run(list, ways, plain);
    rules.Build(rule, list, ways);
    scheduler.Run(list, ways, once);
    OrderTimes times(graph);
    rules.BuildAgain(rule, once, times, list, ways);
    scheduler.Run(list, ways, twice);

    SearchOptions options;
    options.budget.evaluations = 3;  // the plain one, and this rule twice
    options.warm_settings = PipelineRules::ToSettings(rule);
    options.warm_settings.push_back(0);  // not in reversed time
    const auto result = PortfolioStrategy().Solve(graph, options);
    ASSERT_TRUE(result.ok());
    EXPECT_LE(result->makespan_ns, twice.makespan_ns);
    better += twice.makespan_ns < std::min(plain.makespan_ns, once.makespan_ns);
  });
  EXPECT_GT(better, 5);
}

TEST(PortfolioTest, CancelledBeforeItTakesWarmSettings) {
  const std::atomic<bool> cancelled = true;
  ForEachRandomModel(20, [&](const ProblemGraph& graph, const SafePlan&,
                             const ListModel& model) {
    for (const int reversed : {0, 1}) {
      SearchOptions options;
      options.budget.evaluations = 50;
      options.budget.cancelled = &cancelled;
      options.warm_settings =
          PipelineRules::ToSettings(PipelineRules(model).FirstRules().back());
      options.warm_settings.push_back(reversed);
      const auto result = PortfolioStrategy().Solve(graph, options);
      ASSERT_TRUE(result.ok());
      EXPECT_TRUE(TimeSchedule(graph, result->schedule).ok());
      EXPECT_EQ(result->evaluations, 1);
    }
  });
}

}  // namespace
}  // namespace pipeweaver::search
