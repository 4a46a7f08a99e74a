// The safe order: always valid, 1F1B on a plain pipeline, and equal to the test
// vectors that its twins are tested on.
//
// To write the vectors anew:
//   PIPEWEAVER_UPDATE=$PWD/search/plan/testdata/safe_order.json
//       bazel-bin/search/plan/safe_order_test
// (on one line), then look at the difference.

#include "search/plan/safe_order.h"

#include <random>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "search/plan/plan_checker.h"
#include "search/plan/testing/random_problem.h"
#include "search/testing/golden_file.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

constexpr char kVectors[] = "search/plan/testdata/safe_order.json";

Json ToJson(const Problem& problem) {
  Json json = {{"ranks", problem.ranks},
               {"p2p_latency_ns", 0},
               {"split_backward", problem.split_backward},
               {"memory_limit_bytes", problem.memory_limit_bytes},
               {"segments", Json::array()}};
  for (const Sweep& sweep : problem.sweeps) {
    Json segment = {{"id", sweep.id},
                    {"microbatch", sweep.microbatch},
                    {"backward", sweep.backward},
                    {"after", Json::array()},
                    {"stages", Json::array()}};
    for (int producer : sweep.after) {
      segment["after"].push_back(problem.sweeps[producer].id);
    }
    for (const Stage& stage : sweep.stages) {
      Json choices = Json::array();
      for (const Choice& c : stage.choices) {
        Json choice = {{"forward_ns", c.forward_ns},
                       {"input_grad_ns", c.input_grad_ns},
                       {"weight_grad_ns", c.weight_grad_ns},
                       {"activation_bytes", c.activation_bytes},
                       {"backward_bytes", c.backward_bytes},
                       {"weight_grad_bytes", c.weight_grad_bytes}};
        if (c.fused_backward_ns.has_value()) {
          choice["fused_backward_ns"] = *c.fused_backward_ns;
          choice["fused_backward_bytes"] = c.fused_backward_bytes;
        }
        choices.push_back(std::move(choice));
      }
      segment["stages"].push_back({{"rank", stage.rank},
                                   {"transfer_ns", stage.transfer_ns},
                                   {"choices", std::move(choices)}});
    }
    json["segments"].push_back(std::move(segment));
  }
  return json;
}

Json ToJson(const Problem& problem, const Schedule& schedule) {
  Json ranks = Json::array();
  for (const auto& order : schedule.ranks) {
    Json list = Json::array();
    for (const ScheduledStage& s : order) {
      list.push_back({{"kind", std::string(1, StageKindLetter(s.kind))},
                      {"segment", problem.sweeps[s.sweep].id},
                      {"stage", s.stage},
                      {"choice", s.choice}});
    }
    ranks.push_back(std::move(list));
  }
  return {{"ranks", std::move(ranks)}};
}

// Limits each rank to between 70 % and the whole of what the safe order takes
// when memory is ample.
void Tighten(Problem& problem, std::mt19937_64& random) {
  const auto ample = CheckSchedule(problem, *SafeOrder(problem));
  for (int r = 0; r < problem.ranks; ++r) {
    problem.memory_limit_bytes[r] =
        ample->peak_bytes[r] * testing::Uniform(random, 7, 10) / 10;
  }
}

// A plain pipeline: `microbatches` sweeps over `ranks` ranks.
Problem Pipeline(int ranks, int microbatches, int64_t limit_bytes) {
  Problem problem;
  problem.ranks = ranks;
  problem.memory_limit_bytes.assign(ranks, limit_bytes);
  Choice choice;
  choice.forward_ns = 100;
  choice.input_grad_ns = choice.weight_grad_ns = 100;
  choice.activation_bytes = choice.backward_bytes = choice.weight_grad_bytes =
      choice.fused_backward_bytes = 10;
  for (int i = 0; i < microbatches; ++i) {
    Sweep sweep;
    sweep.id = std::string("mb") + std::to_string(i);
    sweep.microbatch = i;
    for (int r = 0; r < ranks; ++r) sweep.stages.push_back({r, 0, {choice}});
    problem.sweeps.push_back(sweep);
  }
  return problem;
}

TEST(SafeOrderTest, PlainPipelineIsOneForwardOneBackward) {
  const Problem problem = Pipeline(4, 8, 40);
  const auto schedule = SafeOrder(problem);
  ASSERT_TRUE(schedule.ok()) << schedule.status();
  const auto checked = CheckSchedule(problem, *schedule);
  ASSERT_TRUE(checked.ok()) << checked.status();
  // 1F1B: (microbatches + ranks - 1) * (F + B).
  EXPECT_EQ(checked->times.makespan_ns, (8 + 3) * 300);
  EXPECT_EQ(checked->peak_bytes[0], 40);
}

// Work is by stage: a million of them on thousands of ranks take a second.
TEST(SafeOrderTest, ManyRanksAreOneForwardOneBackwardToo) {
  const Problem problem = Pipeline(4096, 256, 10 * 256);
  const auto schedule = SafeOrder(problem);
  ASSERT_TRUE(schedule.ok()) << schedule.status();
  const auto checked = CheckSchedule(problem, *schedule);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_EQ(checked->times.makespan_ns, (256 + 4095) * 300);
}

TEST(SafeOrderTest, FewerInFlightWhenMemoryIsShort) {
  for (int in_flight = 1; in_flight <= 4; ++in_flight) {
    const Problem problem = Pipeline(4, 8, 10 * in_flight + 9);
    const auto schedule = SafeOrder(problem);
    ASSERT_TRUE(schedule.ok()) << schedule.status();
    const auto checked = CheckSchedule(problem, *schedule);
    ASSERT_TRUE(checked.ok()) << checked.status();
    EXPECT_EQ(checked->peak_bytes[0], 10 * in_flight);
  }
}

TEST(SafeOrderTest, SaysWhatDoesNotFit) {
  const auto schedule = SafeOrder(Pipeline(2, 2, 9));
  EXPECT_EQ(schedule.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(schedule.status().message()),
              HasSubstr("rank 0: one microbatch in flight needs 10 bytes at "
                        "mb0 stage 0, over the limit of 9"));
}

// The leanest choice may need more at its backward than a less lean one.
TEST(SafeOrderTest, TakesTheLeanestChoiceThatFits) {
  Problem problem = Pipeline(1, 1, 15);
  Choice recompute = problem.sweeps[0].stages[0].choices[0];
  recompute.activation_bytes = 1;
  recompute.backward_bytes = 16;
  problem.sweeps[0].stages[0].choices.Mutable().push_back(recompute);
  EXPECT_EQ(SafeOrder(problem)->ranks[0][0].choice, 0);
  problem.memory_limit_bytes[0] = 16;
  EXPECT_EQ(SafeOrder(problem)->ranks[0][0].choice, 1);
}

TEST(SafeOrderTest, ValidOnRandomProblems) {
  std::mt19937_64 random(2);
  int fits = 0;
  for (int i = 0; i < 2000; ++i) {
    Problem problem = testing::RandomStepProblem(random).problem;
    if (i % 2 == 1) Tighten(problem, random);
    const auto schedule = SafeOrder(problem);
    if (!schedule.ok()) {
      EXPECT_EQ(schedule.status().code(), absl::StatusCode::kResourceExhausted);
      EXPECT_EQ(i % 2, 1);
      continue;
    }
    ++fits;
    const auto checked = CheckSchedule(problem, *schedule);
    EXPECT_TRUE(checked.ok()) << checked.status();
  }
  EXPECT_GT(fits, 1200);
}

// One group at a time: what the rule holds on each rank is then the least that
// any choices need, so a refusal is never wrong. Compared with every choice.
TEST(SafeOrderTest, RefusesOnlyWhatNoChoicesFit) {
  std::mt19937_64 random(3);
  int refused = 0;
  for (int i = 0; i < 2000; ++i) {
    const int stages = static_cast<int>(testing::Uniform(random, 1, 4));
    Problem problem;
    problem.ranks = 1;
    problem.memory_limit_bytes = {testing::Uniform(random, 5, 60)};
    Sweep sweep;
    sweep.id = "a";
    for (int k = 0; k < stages; ++k) {
      Stage stage;
      for (int c = 0; c < 3; ++c) {
        Choice choice;
        choice.activation_bytes = testing::Uniform(random, 0, 20);
        choice.backward_bytes = testing::Uniform(random, 0, 40);
        stage.choices.Mutable().push_back(choice);
      }
      sweep.stages.push_back(stage);
    }
    problem.sweeps = {sweep};
    bool any_fits = false;
    int combinations = 1;
    for (int k = 0; k < stages; ++k) combinations *= 3;
    for (int code = 0; code < combinations && !any_fits; ++code) {
      int64_t held = 0;
      int64_t peak = 0;
      int digits = code;
      for (int k = 0; k < stages; ++k, digits /= 3) {
        const Choice& c = sweep.stages[k].choices[digits % 3];
        peak = std::max(
            {peak, held + c.activation_bytes, held + c.backward_bytes});
        held += c.activation_bytes;
      }
      any_fits = peak <= problem.memory_limit_bytes[0];
    }
    EXPECT_EQ(SafeOrder(problem).ok(), any_fits);
    refused += any_fits ? 0 : 1;
  }
  EXPECT_GT(refused, 100);
}

TEST(SafeOrderTest, EqualsTheTestVectors) {
  std::mt19937_64 random(4);
  std::string vectors = "[\n";
  for (int i = 0; i < 24; ++i) {
    Problem problem = testing::RandomStepProblem(random).problem;
    // Small files: problems of a few sweeps.
    while (problem.sweeps.size() > 9) {
      problem = testing::RandomStepProblem(random).problem;
    }
    if (i % 2 == 1) Tighten(problem, random);
    const auto schedule = SafeOrder(problem);
    const Json vector = {
        {"problem", ToJson(problem)},
        {"schedule", schedule.ok() ? ToJson(problem, *schedule) : Json()}};
    vectors += (i > 0 ? ",\n" : "") + vector.dump();
  }
  vectors += "\n]\n";
  EXPECT_EQ(testing::GoldenText(kVectors, vectors), vectors)
      << kVectors << " differs; a null schedule means that none fits";
}

}  // namespace
}  // namespace pipeweaver::search
