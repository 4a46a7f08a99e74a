// OrderSearch on random problems: whatever it does to an order, the order stays
// complete, within memory, and as long as it says.

#include "search/strategy/order_search.h"

#include <gtest/gtest.h>

#include <cstdint>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/testing/random_models.h"

namespace pipeweaver::search {
namespace {

TEST(OrderSearchTest, LoadAndSaveGiveTheSameOrder) {
  ForEachRandomOrder(
      [](const ProblemGraph& graph, const ListModel&, const TaskOrder& order) {
        OrderSearch search(graph);
        search.Load(order);
        EXPECT_EQ(search.makespan_ns(), order.makespan_ns);
        TaskOrder saved;
        search.Save(saved);
        EXPECT_EQ(saved.makespan_ns, order.makespan_ns);
        ExpectConsistent(graph, saved);
      });
}

TEST(OrderSearchTest, AnnealingKeepsTheBestAndNeverBreaksAnOrder) {
  ForEachRandomOrder(
      [](const ProblemGraph& graph, const ListModel&, const TaskOrder& order) {
        for (const double temperature : {0.0, 0.01, 0.3}) {
          OrderSearch search(graph);
          search.Load(order);
          TaskOrder best = order;
          for (uint64_t seed = 1; seed <= 4; ++seed) {
            WalkOptions options;
            options.moves = 200;
            options.temperature = temperature;
            options.seed = seed;
            EXPECT_LE(search.Anneal(options, best), options.moves);
            EXPECT_LE(best.makespan_ns, order.makespan_ns);
            ExpectConsistent(graph, best);
            TaskOrder now;
            search.Save(now);
            EXPECT_GE(now.makespan_ns, best.makespan_ns);
            ExpectConsistent(graph, now);
          }
        }
      });
}

TEST(OrderSearchTest, OnePassMovesNeverLoseTime) {
  int faster = 0, fused = 0;
  ForEachRandomOrder(
      [&](const ProblemGraph& graph, const ListModel&, const TaskOrder& order) {
        OrderSearch search(graph);
        search.Load(order);
        TaskOrder now;
        faster += search.SpeedUpWhereMemoryAllows();
        EXPECT_LE(search.makespan_ns(), order.makespan_ns);
        const int64_t before = search.makespan_ns();
        search.Save(now);
        ExpectConsistent(graph, now);
        fused += search.FuseWhereSlack();
        EXPECT_LE(search.makespan_ns(), before);
        search.Save(now);
        ExpectConsistent(graph, now);
      });
  EXPECT_GT(faster, 0);
  EXPECT_GT(fused, 0);
}

}  // namespace
}  // namespace pipeweaver::search
