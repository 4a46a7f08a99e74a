// The program checker refuses programs that were made wrong, one way at a time.

#include "search/lower/program_checker.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/lower/lower.h"
#include "search/plan/plan_checker.h"
#include "search/plan/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

struct Case {
  StepProblem step;
  ProgramLimits limits;
  StepPrograms programs;
};

Case RandomCase(std::mt19937_64& random) {
  Case c;
  c.step = testing::RandomStepProblem(random);
  c.limits.memory_limit_bytes = c.step.problem.memory_limit_bytes;
  c.limits.max_receives_ahead = 2;
  const Schedule schedule = testing::RandomSchedule(c.step.problem, random);
  const auto checked = CheckSchedule(c.step.problem, schedule);
  c.programs = *Lower(c.step, schedule, checked->times, c.limits);
  return c;
}

using Place = std::pair<int, int>;  // rank, position

// A random action that satisfies `wanted`.
std::optional<Place> Pick(const Case& c, std::mt19937_64& random,
                          const std::function<bool(const Action&)>& wanted) {
  std::vector<Place> places;
  for (size_t r = 0; r < c.programs.ranks.size(); ++r) {
    for (size_t i = 0; i < c.programs.ranks[r].size(); ++i) {
      if (wanted(c.programs.ranks[r][i])) places.emplace_back(r, i);
    }
  }
  if (places.empty()) return std::nullopt;
  return places[testing::Uniform(random, 0,
                                 static_cast<int64_t>(places.size()) - 1)];
}

bool Any(const Action&) { return true; }
bool IsPost(const Action& a) {
  return a.kind == ActionKind::kPostSend || a.kind == ActionKind::kPostRecv;
}

struct Mutation {
  std::string name;
  // Whether it applied.
  std::function<bool(Case&, std::mt19937_64&)> apply;
};

void MoveBehind(std::vector<Action>& program, int from, int to) {
  const Action a = program[from];
  program.insert(program.begin() + to + 1, a);
  program.erase(program.begin() + from);
}

std::vector<Mutation> Mutations() {
  return {
      {"drop an action",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, Any);
         auto& program = c.programs.ranks[at->first];
         program.erase(program.begin() + at->second);
         return true;
       }},
      {"repeat an action",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, Any);
         auto& program = c.programs.ranks[at->first];
         const Action again = program[at->second];
         program.insert(program.begin() + at->second, again);
         return true;
       }},
      {"swap two posts of a rank",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, IsPost);
         if (!at) return false;
         auto& program = c.programs.ranks[at->first];
         const auto next = std::find_if(program.begin() + at->second + 1,
                                        program.end(), IsPost);
         if (next == program.end()) return false;
         std::swap(program[at->second], *next);
         return true;
       }},
      {"swap two transfers on one rank only",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, IsPost);
         if (!at) return false;
         auto& program = c.programs.ranks[at->first];
         const auto next = std::find_if(program.begin() + at->second + 1,
                                        program.end(), IsPost);
         if (next == program.end()) return false;
         std::swap(program[at->second].transfer, next->transfer);
         return true;
       }},
      {"wait for a receive behind its consumer",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, [](const Action& a) {
           return a.kind == ActionKind::kWaitRecv;
         });
         if (!at) return false;
         auto& program = c.programs.ranks[at->first];
         const Transfer& x = c.programs.transfers[program[at->second].transfer];
         for (int i = at->second + 1; i < static_cast<int>(program.size());
              ++i) {
           const Action& a = program[i];
           if (IsCompute(a.kind) && a.sweep == x.to_sweep &&
               a.stage == x.to_stage &&
               (a.kind != ActionKind::kForward) == x.gradient) {
             MoveBehind(program, at->second, i);
             return true;
           }
         }
         return false;
       }},
      {"send before the value is made",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, [](const Action& a) {
           return a.kind == ActionKind::kPostSend;
         });
         if (!at) return false;
         auto& program = c.programs.ranks[at->first];
         const Action send = program[at->second];
         program.erase(program.begin() + at->second);
         program.insert(program.begin(), send);
         return true;
       }},
      {"wait before the post",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, [](const Action& a) {
           return a.kind == ActionKind::kWaitSend ||
                  a.kind == ActionKind::kWaitRecv;
         });
         if (!at) return false;
         auto& program = c.programs.ranks[at->first];
         const Action wait = program[at->second];
         program.erase(program.begin() + at->second);
         program.insert(program.begin(), wait);
         return true;
       }},
      {"reverse a program",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, [](const Action& a) {
           return a.kind == ActionKind::kBackward ||
                  a.kind == ActionKind::kInputGrad;
         });
         if (!at) return false;
         auto& program = c.programs.ranks[at->first];
         std::reverse(program.begin(), program.end());
         return true;
       }},
      {"another choice",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, [&](const Action& a) {
           return IsCompute(a.kind) && a.kind != ActionKind::kForward;
         });
         if (!at) return false;
         ++c.programs.ranks[at->first][at->second].choice;
         return true;
       }},
      {"drop a transfer with its actions",
       [](Case& c, std::mt19937_64&) {
         if (c.programs.transfers.empty()) return false;
         c.programs.transfers.pop_back();
         const int last = static_cast<int>(c.programs.transfers.size());
         for (auto& program : c.programs.ranks) {
           std::erase_if(program,
                         [&](const Action& a) { return a.transfer == last; });
         }
         return true;
       }},
      {"other bytes",
       [](Case& c, std::mt19937_64&) {
         if (c.programs.transfers.empty()) return false;
         ++c.programs.transfers.back().bytes;
         return true;
       }},
      {"transfer the other way",
       [](Case& c, std::mt19937_64&) {
         if (c.programs.transfers.empty()) return false;
         c.programs.transfers.back().gradient ^= true;
         return true;
       }},
      {"transfer out of range",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, IsPost);
         if (!at) return false;
         c.programs.ranks[at->first][at->second].transfer = 1 << 20;
         return true;
       }},
      {"stage out of range",
       [](Case& c, std::mt19937_64& random) {
         const auto at = Pick(c, random, Any);
         c.programs.ranks[at->first][at->second].stage = -1;
         return true;
       }},
      {"a peak that is not so",
       [](Case& c, std::mt19937_64&) {
         ++c.programs.peak_bytes[0];
         return true;
       }},
      {"less memory than the peak",
       [](Case& c, std::mt19937_64&) {
         c.limits.memory_limit_bytes[0] = c.programs.peak_bytes[0] - 1;
         return !c.programs.ranks[0].empty();
       }},
      {"an item in two sub-microbatches",
       [](Case& c, std::mt19937_64&) {
         c.step.sub_microbatches[0].items.push_back(
             c.step.sub_microbatches[0].items[0]);
         return true;
       }},
      {"an item in no sub-microbatch",
       [](Case& c, std::mt19937_64&) {
         c.step.sub_microbatches[0].items[0] += 7;
         return true;
       }},
      {"an empty modality with items",
       [](Case& c, std::mt19937_64&) {
         c.step.empty.push_back({c.step.sub_microbatches[0].microbatch,
                                 c.step.sub_microbatches[0].module});
         return true;
       }},
  };
}

TEST(ProgramCheckerTest, RefusesEveryMutation) {
  for (const Mutation& mutation : Mutations()) {
    SCOPED_TRACE(mutation.name);
    std::mt19937_64 random(5);
    int applied = 0;
    for (int i = 0; i < 300; ++i) {
      Case c = RandomCase(random);
      ASSERT_TRUE(CheckPrograms(c.step, c.programs, c.limits).ok());
      if (!mutation.apply(c, random)) continue;
      ++applied;
      const absl::Status status = CheckPrograms(c.step, c.programs, c.limits);
      ASSERT_EQ(status.code(), absl::StatusCode::kFailedPrecondition)
          << "case " << i;
    }
    EXPECT_GT(applied, 50);
  }
}

TEST(ProgramCheckerTest, RefusesTooManyReceivesAhead) {
  std::mt19937_64 random(6);
  int refused = 0;
  for (int i = 0; i < 300; ++i) {
    Case c = RandomCase(random);
    c.limits.max_receives_ahead = 1;
    const absl::Status status = CheckPrograms(c.step, c.programs, c.limits);
    if (status.ok()) continue;
    ++refused;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("2 receives ahead, over the limit of 1"));
  }
  EXPECT_GT(refused, 20);
}

// Both ranks wait for their send before they post their receive: buffered sends
// forgive it, a rendezvous does not.
TEST(ProgramCheckerTest, RefusesWhatHangsOnARendezvous) {
  StepProblem step;
  step.problem.ranks = 2;
  step.problem.memory_limit_bytes = {100, 100};
  Choice choice;
  choice.forward_ns = 1;
  step.choices = {{{{{}}, {{}}}}, {{{{}}, {{}}}}};
  for (int m = 0; m < 2; ++m) {
    Sweep sweep;
    sweep.id = m == 0 ? "there" : "back";
    sweep.backward = false;
    sweep.stages = {{m, 1, {choice}}, {1 - m, 1, {choice}}};
    step.problem.sweeps.push_back(sweep);
    step.sub_microbatches.push_back({m, 0, {0}, 1});
    step.sweeps.push_back({m, 0});
    step.output_bytes.push_back(5);
    step.after_bytes.emplace_back();
  }
  Schedule schedule;
  schedule.ranks = {
      {{StageKind::kForward, 0, 0, 0}, {StageKind::kForward, 1, 1, 0}},
      {{StageKind::kForward, 1, 0, 0}, {StageKind::kForward, 0, 1, 0}}};
  const ProgramLimits limits = {{100, 100}, 2};
  const auto checked = CheckSchedule(step.problem, schedule);
  ASSERT_TRUE(checked.ok()) << checked.status();
  StepPrograms programs = *Lower(step, schedule, checked->times, limits);
  ASSERT_TRUE(CheckPrograms(step, programs, limits).ok());
  for (auto& program : programs.ranks) {
    const auto with = [&](ActionKind kind) {
      return *std::find_if(program.begin(), program.end(),
                           [&](const Action& a) { return a.kind == kind; });
    };
    const Action first = program.front().kind == ActionKind::kForward
                             ? program.front()
                             : with(ActionKind::kForward);
    Action second;
    for (const Action& a : program) {
      if (IsCompute(a.kind)) second = a;
    }
    program = {first,
               with(ActionKind::kPostSend),
               with(ActionKind::kWaitSend),
               with(ActionKind::kPostRecv),
               with(ActionKind::kWaitRecv),
               second};
  }
  EXPECT_THAT(std::string(CheckPrograms(step, programs, limits).message()),
              HasSubstr("the ranks wait for each other: rank 0 action 2 "
                        "(WAIT_SEND of transfer 0"));
}

}  // namespace
}  // namespace pipeweaver::search
