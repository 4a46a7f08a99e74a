// RebuildSearch on random problems: its best order is complete, within memory,
// as long as it says, and never longer than where it began.

#include "search/strategy/rebuild_search.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/order_search.h"
#include "search/strategy/pipeline_rule.h"
#include "search/strategy/testing/random_models.h"

namespace pipeweaver::search {
namespace {

WalkOptions Options(double temperature) {
  WalkOptions options;
  options.moves = 8192;
  options.temperature = temperature;
  return options;
}

TEST(RebuildSearchTest, KeepsTheBestAndNeverBreaksAnOrder) {
  int better = 0;
  ForEachRandomOrder([&](const ProblemGraph& graph, const ListModel& model,
                         const TaskOrder& order) {
    const PipelineRules rules(model);
    ListScheduler scheduler(model);
    for (const double temperature : {0.0, 0.01}) {
      RebuildSearch search(model, rules);
      search.Load(order);
      TaskOrder best = order;
      for (int walk = 0; walk < 2; ++walk) {
        EXPECT_LE(search.Walk(Options(temperature), scheduler, best),
                  Options(temperature).moves);
        EXPECT_LE(best.makespan_ns, order.makespan_ns);
        ExpectConsistent(graph, best);
      }
      better += best.makespan_ns < order.makespan_ns ? 1 : 0;
    }
  });
  EXPECT_GT(better, 10);
}

TEST(RebuildSearchTest, SameWalkFromTheSameSeed) {
  ForEachRandomOrder(
      [](const ProblemGraph&, const ListModel& model, const TaskOrder& order) {
        const PipelineRules rules(model);
        ListScheduler scheduler(model);
        TaskOrder bests[2];
        for (TaskOrder& best : bests) {
          RebuildSearch search(model, rules);
          search.Load(order);
          best = order;
          search.Walk(Options(0.01), scheduler, best);
        }
        EXPECT_EQ(bests[0].tasks, bests[1].tasks);
      });
}

TEST(RebuildSearchTest, StopsWhenTold) {
  ForEachRandomOrder(
      [](const ProblemGraph&, const ListModel& model, const TaskOrder& order) {
        const PipelineRules rules(model);
        ListScheduler scheduler(model);
        RebuildSearch search(model, rules);
        search.Load(order);
        TaskOrder best = order;
        const std::function<bool()> stop = [] { return true; };
        WalkOptions options = Options(0);
        options.stop = &stop;
        EXPECT_EQ(search.Walk(options, scheduler, best), 0);
        options.stop = nullptr;
        options.stop_at_ns = best.makespan_ns;
        EXPECT_EQ(search.Walk(options, scheduler, best), 0);
        options.stop_at_ns = 0;
        options.moves = 100;  // too few for a schedule
        EXPECT_EQ(search.Walk(options, scheduler, best), 0);
      });
}

}  // namespace
}  // namespace pipeweaver::search
