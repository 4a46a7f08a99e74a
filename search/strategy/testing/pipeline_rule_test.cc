// Rules for pipelines on random problems: whatever a rule says, a valid
// schedule comes of it; as numbers it survives, and numbers that are none are
// refused.

#include "search/strategy/pipeline_rule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/order_times.h"
#include "search/strategy/safe_plan.h"
#include "search/strategy/testing/plain_choice.h"
#include "search/strategy/testing/random_models.h"

namespace pipeweaver::search {
namespace {

constexpr uint64_t kSeeds = 40;

// Calls visit(graph, model, rules) for random problems.
template <typename Visitor>
void ForEachProblem(const Visitor& visit) {
  ForEachRandomModel(kSeeds, [&](const ProblemGraph& graph, const SafePlan&,
                                 const ListModel& model) {
    visit(graph, model, PipelineRules(model));
  });
}

TEST(PipelineRuleTest, EveryRuleGivesAValidSchedule) {
  ForEachProblem([](const ProblemGraph& graph, const ListModel& model,
                    const PipelineRules& rules) {
    std::vector<PipelineRule> all = rules.FirstRules();
    for (const auto& order : rules.OtherOrders(all.front())) {
      all.insert(all.end(), order.begin(), order.end());
    }
    for (const PipelineRules::Part part : PipelineRules::kParts) {
      const auto variations = rules.Variations(all.front(), part);
      all.insert(all.end(), variations.begin(), variations.end());
    }
    std::mt19937_64 random(1);
    for (int i = 0; i < 50; ++i) {
      all.push_back(rules.Mutate(all[random() % all.size()], random));
    }
    ListScheduler scheduler(model);
    ListRule list;
    Ways ways;
    TaskOrder order;
    for (const PipelineRule& rule : all) {
      rules.Build(rule, list, ways);
      scheduler.Run(list, ways, order);
      const Schedule schedule = ToSchedule(graph, order);
      const auto times = TimeSchedule(graph, schedule);
      ASSERT_TRUE(times.ok()) << times.status();
      EXPECT_EQ(times->makespan_ns, order.makespan_ns);
      EXPECT_TRUE(CheckMemory(graph, schedule).ok());
    }
  });
}

// The work of each group, in the order in which they enter.
std::vector<int64_t> HeightsOf(const ProblemGraph& graph,
                               const PipelineRules& rules,
                               const std::vector<int32_t>& groups) {
  std::vector<int64_t> work_ns(rules.groups(), 0);
  for (int p = 0; p < graph.pairs; ++p) {
    work_ns[rules.group_of_pair(p)] += graph.choices_of(p)[0].forward_ns;
  }
  std::vector<int64_t> heights;
  heights.reserve(groups.size());
  for (const int32_t group : groups) heights.push_back(work_ns[group]);
  return heights;
}

bool IsHill(const std::vector<int64_t>& heights) {
  const auto top = std::max_element(heights.begin(), heights.end());
  return std::is_sorted(heights.begin(), top) &&
         std::is_sorted(top, heights.end(), std::greater<>());
}

TEST(PipelineRuleTest, OtherOrdersAreHillsWithTheLargestWhereTheySay) {
  using Order = PipelineRule::GroupOrder;
  ForEachProblem([](const ProblemGraph& graph, const ListModel&,
                    const PipelineRules& rules) {
    std::vector<Order> seen;
    for (const auto& order : rules.OtherOrders(rules.FirstRules().front())) {
      const PipelineRule& rule = order.front();
      seen.push_back(rule.group_order);
      const std::vector<int64_t> heights = HeightsOf(graph, rules, rule.groups);
      EXPECT_TRUE(IsHill(heights));
      const int64_t top = *std::max_element(heights.begin(), heights.end());
      if (rule.group_order == Order::kRising) {
        EXPECT_EQ(heights.back(), top);
      }
      if (rule.group_order == Order::kSteepHill) {
        EXPECT_EQ(heights[heights.size() / 2], top);
      }
    }
    if (seen.empty()) return;  // all groups are alike
    EXPECT_EQ(seen, (std::vector<Order>{Order::kHill, Order::kRising,
                                        Order::kLateHill, Order::kSteepHill}));
  });
}

TEST(PipelineRuleTest, RandomChangesOfAHillAreHillsOrExchanges) {
  int hills = 0, exchanges = 0;
  ForEachProblem([&](const ProblemGraph& graph, const ListModel&,
                     const PipelineRules& rules) {
    const auto orders = rules.OtherOrders(rules.FirstRules().front());
    if (orders.empty()) return;  // all groups are alike
    const PipelineRule& hill = orders.front().front();
    ASSERT_EQ(hill.group_order, PipelineRule::GroupOrder::kHill);
    std::mt19937_64 random(1);
    for (int i = 0; i < 50; ++i) {
      const std::vector<int32_t> order = rules.Mutate(hill, random).groups;
      ASSERT_TRUE(std::is_permutation(order.begin(), order.end(),
                                      hill.groups.begin(), hill.groups.end()));
      if (order == hill.groups) continue;
      if (IsHill(HeightsOf(graph, rules, order))) {
        ++hills;
        continue;
      }
      int moved = 0;
      for (size_t g = 0; g < order.size(); ++g) {
        moved += order[g] != hill.groups[g];
      }
      EXPECT_EQ(moved, 2);
      ++exchanges;
    }
  });
  EXPECT_GT(hills, exchanges);
  EXPECT_GT(exchanges, 0);
}

TEST(PipelineRuleTest, VariationsAndRandomChangesHoldBack) {
  std::mt19937_64 random(1);
  ForEachProblem(
      [&](const ProblemGraph&, const ListModel&, const PipelineRules& rules) {
        const std::vector<PipelineRule> first = rules.FirstRules();
        for (const PipelineRule& rule : first) EXPECT_FALSE(rule.holds_back);
        for (const auto part : PipelineRules::kParts) {
          for (const auto& rule : rules.Variations(first.front(), part)) {
            EXPECT_TRUE(rule.holds_back);
          }
        }
        EXPECT_TRUE(rules.Mutate(first.front(), random).holds_back);
      });
}

TEST(PipelineRuleTest, RandomChangesAreScheduledTwice) {
  std::mt19937_64 random(1);
  ForEachProblem(
      [&](const ProblemGraph&, const ListModel&, const PipelineRules& rules) {
        const PipelineRule rule = rules.FirstRules().front();
        EXPECT_FALSE(rule.twice);
        for (int i = 0; i < 20; ++i) {
          EXPECT_TRUE(rules.Mutate(rule, random).twice);
        }
      });
}

TEST(PipelineRuleTest, WhereMemoryIsDearItsNumbersChangeOftenAndByLittle) {
  int changes = 0, near = 0, far = 0, on_one = 0, on_all = 0, opened = 0;
  std::mt19937_64 random(1);
  ForEachProblem([&](const ProblemGraph& graph, const ListModel&,
                     const PipelineRules& rules) {
    if (rules.prices() < 8 || graph.ranks < 2) return;
    PipelineRule rule = rules.FirstRules().front();
    rule.price.assign(graph.ranks, static_cast<uint8_t>(rules.prices() / 2));
    rule.open = 16;
    for (int i = 0; i < 100; ++i, ++changes) {
      const PipelineRule other = rules.Mutate(rule, random);
      EXPECT_TRUE(other.open == rule.open || other.price == rule.price);
      if (other.open != rule.open) {
        ++opened;
        ++(std::abs(other.open - rule.open) <= 2 ? near : far);
      }
      std::vector<int> steps;
      for (int r = 0; r < graph.ranks; ++r) {
        if (other.price[r] == rule.price[r]) continue;
        steps.push_back(other.price[r] - rule.price[r]);
      }
      if (steps.empty()) continue;
      EXPECT_EQ(std::count(steps.begin(), steps.end(), steps[0]), steps.size());
      ++(std::abs(steps[0]) <= 2 ? near : far);
      ++(steps.size() == 1 ? on_one : on_all);
    }
  });
  ASSERT_GT(changes, 0);
  EXPECT_GT(opened, changes / 10);
  EXPECT_GT(on_one, changes / 20);
  EXPECT_GT(on_all, changes / 20);
  EXPECT_GT(near, 2 * far);
}

TEST(PipelineRuleTest, NumbersAtTheirEndsStayThere) {
  std::mt19937_64 random(1);
  ForEachProblem([&](const ProblemGraph& graph, const ListModel&,
                     const PipelineRules& rules) {
    PipelineRule rule = rules.FirstRules().front();
    rule.rhythm = PipelineRule::Rhythm::kPaced;
    rule.price.assign(graph.ranks, static_cast<uint8_t>(rules.prices() - 1));
    for (const bool low : {true, false}) {
      rule.open = low ? 1 : 32;
      rule.lag = 0;
      rule.stretch = low ? 0 : 24;
      for (int i = 0; i < 100; ++i) {
        const PipelineRule other = rules.Mutate(rule, random);
        EXPECT_GE(other.open, 0);
        EXPECT_GE(other.lag, 0);
        EXPECT_GE(other.stretch, 0);
        EXPECT_LE(other.stretch, 24);
        for (const uint8_t price : other.price) {
          EXPECT_LT(price, rules.prices());
        }
        EXPECT_TRUE(
            rules.FromSettings(PipelineRules::ToSettings(other)).has_value());
      }
    }
  });
}

TEST(PipelineRuleTest, PricesMostlyStayWhereMemoryCostsNothing) {
  int changes = 0, changed = 0;
  std::mt19937_64 random(1);
  ForEachProblem(
      [&](const ProblemGraph&, const ListModel&, const PipelineRules& rules) {
        const PipelineRule rule = rules.FirstRules().front();
        for (int i = 0; i < 100; ++i, ++changes) {
          changed += rules.Mutate(rule, random).price != rule.price;
        }
      });
  EXPECT_LT(changed, changes / 8);
}

// One sweep a microbatch, of one stage on the only rank: `choices`, and room
// for `limit_bytes`.
Problem OneRank(int microbatches, const std::vector<Choice>& choices,
                int64_t limit_bytes) {
  Problem problem;
  problem.ranks = 1;
  problem.memory_limit_bytes = {limit_bytes};
  for (int i = 0; i < microbatches; ++i) {
    Sweep& sweep = problem.sweeps.emplace_back();
    sweep.id = std::to_string(i);
    sweep.stages = {{.rank = 0, .choices = ChoiceList(choices)}};
  }
  return problem;
}

// Calls visit(graph, rules) for `problem`.
template <typename Visitor>
void WithRules(const Problem& problem, const Visitor& visit) {
  const ProblemGraph graph = BuildProblemGraph(problem);
  const auto plan = FindSafePlan(graph);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const ListModel model(graph, *plan);
  visit(graph, PipelineRules(model));
}

TEST(PipelineRuleTest, ForwardsAreHeldBackWhereMemoryIsScarce) {
  const auto held_back = [](const PipelineRules& rules,
                            const PipelineRule& rule) {
    ListRule list;
    Ways ways;
    rules.Build(rule, list, ways);
    EXPECT_EQ(!list.not_before_ns.empty(), rules.MemoryIsScarce(rule));
    return !list.not_before_ns.empty();
  };
  // A microbatch takes 30 ns.
  WithRules(OneRank(4, {PlainChoice(20, 10)}, 40),
            [&](const ProblemGraph&, const PipelineRules& rules) {
              EXPECT_FALSE(held_back(rules, rules.FirstRules().front()));
            });
  WithRules(
      OneRank(4, {PlainChoice(20, 10)}, 39),
      [&](const ProblemGraph&, const PipelineRules& rules) {
        const PipelineRule rule = rules.FirstRules().front();
        EXPECT_TRUE(held_back(rules, rule));
        // Due one after the other, as the rank gets to them: forwards may
        // run 0.7 * 10 ns ahead, for backwards start 10 ns after them.
        ListRule list;
        Ways ways;
        rules.Build(rule, list, ways);
        EXPECT_EQ(list.not_before_ns, (std::vector<int64_t>{-7, 23, 53, 83}));
      });
  // Where time buys memory, however little there is, only if it costs much.
  WithRules(
      OneRank(4, {PlainChoice(20, 10), PlainChoice(25, 5), PlainChoice(35, 4)},
              10),
      [&](const ProblemGraph&, const PipelineRules& rules) {
        PipelineRule rule = rules.FirstRules().front();
        EXPECT_FALSE(held_back(rules, rule));
        rule.price = {static_cast<uint8_t>(rules.prices() - 1)};
        EXPECT_FALSE(held_back(rules, rule));
        rule.holds_back = true;
        EXPECT_TRUE(held_back(rules, rule));
      });
}

TEST(PipelineRuleTest, SecondSchedulesGoByTheLatestTimesOfTheFirst) {
  std::mt19937_64 random(1);
  int held_back = 0, repriced = 0, plain = 0;
  ForEachProblem([&](const ProblemGraph& graph, const ListModel& model,
                     const PipelineRules& rules) {
    ListScheduler scheduler(model);
    OrderTimes times(graph);
    PipelineRule rule = rules.FirstRules().back();
    for (int i = 0; i < 20; ++i) {
      ListRule list;
      Ways ways;
      TaskOrder order, again;
      rules.Build(rule, list, ways);
      scheduler.Run(list, ways, order);
      rules.BuildAgain(rule, order, times, list, ways);
      OrderTimes new_times(graph);
      std::vector<int64_t> latest_ns, hold_ns;
      new_times.Latest(order, latest_ns);
      EXPECT_EQ(list.key, latest_ns);
      EXPECT_FALSE(list.strict);
      Ways expected = order.ways;
      if (rules.MemoryIsScarce(rule)) {
        ListRule held;
        rules.HoldBack(latest_ns, held);
        EXPECT_EQ(list.not_before_ns, held.not_before_ns);
        new_times.Holds(hold_ns);
        rules.Reprice(rule, hold_ns, expected);
        ++held_back;
        repriced += expected.choice != order.ways.choice;
      } else {
        EXPECT_TRUE(list.not_before_ns.empty());
        ++plain;
      }
      EXPECT_EQ(ways.choice, expected.choice);
      EXPECT_EQ(ways.fused, order.ways.fused);
      scheduler.Run(list, ways, again);
      ExpectConsistent(graph, again);
      rule = rules.Mutate(rule, random);
    }
  });
  EXPECT_GT(plain, 100);
  EXPECT_GT(held_back, 100);
  EXPECT_GT(repriced, 20);
}

TEST(PipelineRuleTest, WhatIsShortlyHeldStillFitsAlone) {
  // Kept activations of the two sweeps do not fit together.
  Problem problem = OneRank(2, {PlainChoice(20, 10), PlainChoice(21, 5)}, 15);
  problem.sweeps[1].after = {0};
  WithRules(problem, [](const ProblemGraph&, const PipelineRules& rules) {
    PipelineRule rule = rules.FirstRules().front();
    ListRule list;
    Ways ways;
    rules.Build(rule, list, ways);
    const Ways built = ways;
    EXPECT_NE(ways.choice, (std::vector<int32_t>{0, 0}));
    rules.Reprice(rule, std::vector<int64_t>{1, 1000}, ways);
    EXPECT_GE(ways.choice[0], built.choice[0]);
    EXPECT_GE(ways.choice[1], built.choice[1]);
  });
}

TEST(PipelineRuleTest, WhatHeldItsMemoryLongerIsRunLeaner) {
  const std::vector<Choice> choices = {PlainChoice(20, 10), PlainChoice(21, 5),
                                       PlainChoice(35, 1)};
  WithRules(OneRank(3, choices, 100), [](const ProblemGraph& graph,
                                         const PipelineRules& rules) {
    PipelineRule rule = rules.FirstRules().front();
    ListRule list;
    Ways ways, again;
    int changed = 0;
    for (int price = 0; price < rules.prices(); ++price) {
      rule.price = {static_cast<uint8_t>(price)};
      rules.Build(rule, list, ways);
      // As long as was expected: nothing changes.
      again = ways;
      rules.Reprice(rule, std::vector<int64_t>(graph.pairs, 50), again);
      EXPECT_EQ(again.choice, ways.choice);
      rules.Reprice(rule, std::vector<int64_t>(graph.pairs, 0), again);
      EXPECT_EQ(again.choice, ways.choice);
      rules.Reprice(rule, std::vector<int64_t>{0, 50, 1000}, again);
      EXPECT_LE(again.choice[0], ways.choice[0]);
      EXPECT_GE(again.choice[2], ways.choice[2]);
      changed += again.choice != ways.choice;
    }
    EXPECT_GT(changed, 0);
  });
}

TEST(PipelineRuleTest, WhatIsFusedStaysSoWhenPricesChange) {
  Choice keep = PlainChoice(20, 10), lean = PlainChoice(30, 1);
  keep.weight_grad_ns = lean.weight_grad_ns = 10;
  keep.fused_backward_ns = 25;
  keep.fused_backward_bytes = 10;
  Problem problem = OneRank(2, {keep, lean}, 100);
  problem.split_backward = true;
  WithRules(problem, [](const ProblemGraph& graph, const PipelineRules& rules) {
    ASSERT_EQ(graph.mode[0], PairMode::kSplit);
    PipelineRule rule = rules.FirstRules().front();
    rule.price = {static_cast<uint8_t>(rules.prices() - 1)};
    Ways ways;
    ways.choice.assign(graph.pairs, 0);
    ways.fused = {Ways::kFused, Ways::kApart};
    rules.Reprice(rule, std::vector<int64_t>(graph.pairs, 50), ways);
    // The lean choice has no B in one piece.
    EXPECT_EQ(ways.choice, (std::vector<int32_t>{0, 1}));
    EXPECT_EQ(ways.fused, (std::vector<uint8_t>{Ways::kFused, Ways::kApart}));
  });
}

TEST(PipelineRuleTest, SettingsAreARuleButForSingleMoves) {
  ForEachProblem(
      [](const ProblemGraph&, const ListModel&, const PipelineRules& rules) {
        std::mt19937_64 random(1);
        PipelineRule rule = rules.FirstRules().front();
        for (int i = 0; i < 30; ++i) {
          rule = rules.Mutate(rule, random);
          const std::vector<int32_t> settings = PipelineRules::ToSettings(rule);
          const std::optional<PipelineRule> back = rules.FromSettings(settings);
          ASSERT_TRUE(back.has_value());
          EXPECT_EQ(PipelineRules::ToSettings(*back), settings);
          EXPECT_EQ(back->groups.size(), rule.groups.size());
        }
      });
}

TEST(PipelineRuleTest, NumbersThatMakeNoRuleAreRefused) {
  ForEachProblem(
      [](const ProblemGraph&, const ListModel&, const PipelineRules& rules) {
        const std::vector<int32_t> good =
            PipelineRules::ToSettings(rules.FirstRules().front());
        EXPECT_FALSE(rules.FromSettings({}).has_value());
        std::vector<int32_t> bad = good;
        bad.push_back(0);
        EXPECT_FALSE(rules.FromSettings(bad).has_value());
        for (size_t i = 0; i < good.size(); ++i) {
          bad = good;
          bad[i] = -1;
          EXPECT_FALSE(rules.FromSettings(bad).has_value());
          bad[i] = 1 << 30;
          EXPECT_FALSE(rules.FromSettings(bad).has_value());
        }
      });
}

}  // namespace
}  // namespace pipeweaver::search
