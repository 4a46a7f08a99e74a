#include "search/partition/step_problem.h"

#include <optional>

#include "gtest/gtest.h"

namespace pipeweaver::search {
namespace {

TEST(StepProblemTest, MostOffloadBytesAreThoseOfAChoiceThatOffloads) {
  StepProblem step;
  step.choices = {{{{{.name = "keep"}, {.name = "recompute"}}}}};
  EXPECT_EQ(MostOffloadBytes(step), std::nullopt);
  step.choices.push_back(
      {{{{.name = "keep"},
         {.name = "offload1", .offload_layers = 1, .offload_bytes = 7}}},
       {{{.name = "offload2", .offload_layers = 2, .offload_bytes = 5}}}});
  EXPECT_EQ(MostOffloadBytes(step), 7);
}

}  // namespace
}  // namespace pipeweaver::search
