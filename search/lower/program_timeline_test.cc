// The timeline of programs is the same whether they came as bytes or not.

#include "search/lower/program_timeline.h"

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/lower/lower.h"
#include "search/plan/plan_checker.h"
#include "search/plan/testing/random_problem.h"
#include "search/plan_evaluator.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

TEST(ProgramTimelineTest, EqualFromValuesAndFromBytes) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 100; ++i) {
    const StepProblem step = testing::RandomStepProblem(random);
    const Schedule schedule = testing::RandomSchedule(step.problem, random);
    const auto checked = CheckSchedule(step.problem, schedule);
    StepPrograms programs = *Lower(step, schedule, checked->times,
                                   {step.problem.memory_limit_bytes, 2});
    const PlanEvaluator evaluator(step, programs, {});
    const auto emulated = evaluator.Emulate({});
    ASSERT_TRUE(emulated.ok()) << emulated.status();
    PlanEvaluator::WriteTimes(*emulated, &programs);
    const std::vector<std::string> modules(step.choices.size(), "m");
    const semu::Timeline direct = ProgramTimeline(step, programs, modules);
    std::vector<ParsedProgram> parsed;
    for (const std::string& bytes :
         SerializePlan(step, programs, {}).programs) {
      parsed.push_back(*ParseProgram(bytes));
    }
    const auto from_bytes = ProgramTimeline(parsed, modules);
    ASSERT_TRUE(from_bytes.ok()) << from_bytes.status();
    ASSERT_EQ(direct.spans.size(), from_bytes->spans.size());
    for (size_t k = 0; k < direct.spans.size(); ++k) {
      EXPECT_EQ(direct.spans[k].rank, from_bytes->spans[k].rank);
      EXPECT_EQ(direct.spans[k].start_ns, from_bytes->spans[k].start_ns);
      EXPECT_EQ(direct.spans[k].end_ns, from_bytes->spans[k].end_ns);
      EXPECT_EQ(direct.spans[k].kind, from_bytes->spans[k].kind);
      EXPECT_EQ(direct.spans[k].module, from_bytes->spans[k].module);
      EXPECT_EQ(direct.spans[k].microbatch, from_bytes->spans[k].microbatch);
    }
    ASSERT_EQ(direct.transfers.size(), from_bytes->transfers.size());
    for (size_t k = 0; k < direct.transfers.size(); ++k) {
      EXPECT_EQ(direct.transfers[k].from_span,
                from_bytes->transfers[k].from_span);
      EXPECT_EQ(direct.transfers[k].to_span, from_bytes->transfers[k].to_span);
      EXPECT_EQ(direct.transfers[k].bytes, from_bytes->transfers[k].bytes);
    }
    const auto memory = evaluator.Memory(programs);
    for (int r = 0; r < step.problem.ranks; ++r) {
      if (memory[r].empty()) continue;
      EXPECT_EQ(memory[r].back().bytes, 0);
    }
    if (parsed.size() < 2) continue;
    std::swap(parsed[0], parsed[1]);
    EXPECT_THAT(
        std::string(ProgramTimeline(parsed, modules).status().message()),
        HasSubstr("programs[0]: of rank 1"));
  }
}

}  // namespace
}  // namespace pipeweaver::search
