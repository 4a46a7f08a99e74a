// Tests of the reader and writer of problems, and of problem_validation.h.

#include "search/problem/problem_json.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "search/problem/field_error.h"
#include "search/problem/problem_validation.h"

namespace pipeweaver::search {
namespace {

// A problem with one placeholder to break.
std::string ProblemText(const std::string& choice_members,
                        const std::string& stage_members = "",
                        const std::string& sweep_members = "",
                        const std::string& members = "") {
  return "{\"ranks\": 2, \"p2p_latency_ns\": 5, \"split_backward\": true, "
         "\"memory_limit_bytes\": [10, \"20\"], " +
         members +
         "\"segments\": ["
         "{\"id\": \"a\", \"stages\": [{\"rank\": 0, \"choices\": ["
         "{\"forward_ns\": 1, \"input_grad_ns\": 2, \"weight_grad_ns\": 3, "
         "\"activation_bytes\": 4}]}]}, "
         "{\"id\": \"b\", \"microbatch\": 3, \"after\": [\"a\", \"a\"], " +
         sweep_members + "\"stages\": [{\"rank\": 1, " + stage_members +
         "\"choices\": [{\"forward_ns\": \"7\", \"input_grad_ns\": 2, "
         "\"weight_grad_ns\": 3, " +
         choice_members + "\"activation_bytes\": 4}]}]}]}";
}

TEST(ParseProblemJsonTest, FillsDefaults) {
  const auto problem = ParseProblemJson(ProblemText(
      "\"fused_backward_ns\": 4, \"backward_bytes\": 6, \"unknown\": [{}], "));
  ASSERT_TRUE(problem.ok()) << problem.status();
  EXPECT_EQ(problem->ranks, 2);
  EXPECT_EQ(problem->memory_limit_bytes, (std::vector<int64_t>{10, 20}));
  const Sweep& b = problem->sweeps[1];
  EXPECT_TRUE(b.backward);
  EXPECT_EQ(b.microbatch, 3);
  EXPECT_EQ(b.after, (absl::InlinedVector<int, 4>{0}));
  EXPECT_EQ(b.stages[0].transfer_ns, 5);
  const Choice& choice = b.stages[0].choices[0];
  EXPECT_EQ(choice.forward_ns, 7);
  EXPECT_EQ(choice.backward_bytes, 6);
  EXPECT_EQ(choice.weight_grad_bytes, 4);
  EXPECT_EQ(choice.fused_backward_ns, 4);
  EXPECT_EQ(choice.fused_backward_bytes, 6);
}

TEST(ParseProblemJsonTest, ReadsBackWhatItWrites) {
  const auto problem = ParseProblemJson(
      ProblemText("\"fused_backward_ns\": 4, \"fused_backward_bytes\": 9, ",
                  "\"transfer_ns\": 8, ", "", ""));
  ASSERT_TRUE(problem.ok());
  const std::string text = ProblemToJson(*problem);
  const auto again = ParseProblemJson(text);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(ProblemToJson(*again), text);
}

TEST(ParseProblemJsonTest, NamesFieldValueAndRule) {
  const std::string big = "1000000000000000000";
  struct Case {
    std::string text, field, value;
  };
  const std::vector<Case> cases = {
      {"[]", "file", "a list of 0"},
      {"{", "file", ""},
      {"{}", "ranks", "missing"},
      {ProblemText("\"backward_bytes\": -1, "),
       "segments[1].stages[0].choices[0].backward_bytes", "-1"},
      {ProblemText("\"backward_bytes\": 1.0, "),
       "segments[1].stages[0].choices[0].backward_bytes", "1.0"},
      {ProblemText("\"backward_bytes\": true, "),
       "segments[1].stages[0].choices[0].backward_bytes", "true"},
      {ProblemText("\"backward_bytes\": \"\", "),
       "segments[1].stages[0].choices[0].backward_bytes", "\"\""},
      {ProblemText("\"backward_bytes\": \"1e3\", "),
       "segments[1].stages[0].choices[0].backward_bytes", "\"1e3\""},
      {ProblemText("\"backward_bytes\": " + big + ", "),
       "segments[1].stages[0].choices[0].backward_bytes", big},
      {ProblemText("", "\"rank\": 2, "), "segments[1].stages[0].rank", "2"},
      {ProblemText("", "\"rank\": \"1\", "), "segments[1].stages[0].rank",
       "\"1\""},
      {ProblemText("", "", "\"after\": [\"c\"], "), "segments[1].after[0]",
       "\"c\""},
      {ProblemText("", "", "\"after\": [\"b\"], "), "segments[1].after", "b"},
      {ProblemText("", "", "\"id\": \"a\", "), "segments[1].id", "a"},
      {ProblemText("", "", "\"backward\": false, "), "segments[1].after", "a"},
      {ProblemText("", "", "\"backward\": 1, "), "segments[1].backward", "1"},
      {ProblemText("", "", "", "\"memory_limit_bytes\": [1], "),
       "memory_limit_bytes", "a list of 1"},
  };
  for (const Case& c : cases) {
    const auto problem = ParseProblemJson(c.text);
    ASSERT_FALSE(problem.ok()) << c.text;
    const FieldErrorParts parts = GetFieldErrorParts(problem.status());
    EXPECT_EQ(parts.field, c.field) << c.text;
    if (!c.value.empty()) {
      EXPECT_EQ(parts.value, c.value) << c.text;
    }
    EXPECT_FALSE(parts.rule.empty());
  }
}

TEST(ParseProblemJsonTest, SaysWhyItIsNotJson) {
  const auto parts = [](const std::string& text) {
    return GetFieldErrorParts(ParseProblemJson(text).status());
  };
  const FieldErrorParts comma = parts("{\"ranks\": 4,\n \"a\" 5}");
  EXPECT_EQ(comma.field, "file");
  EXPECT_EQ(comma.value, "line 2, column 6");
  EXPECT_EQ(comma.rule,
            "must be JSON: syntax error while parsing object separator - "
            "unexpected number literal; expected ':'");
  // However long what was read is, what was expected is there.
  const FieldErrorParts text = parts("{\"" + std::string(10'000, 'x'));
  EXPECT_LT(text.rule.size(), 400u);
  EXPECT_NE(text.rule.find("missing closing quote; last read: '\"xxx"),
            std::string::npos)
      << text.rule;
  EXPECT_NE(text.rule.find("; expected string literal"), std::string::npos)
      << text.rule;
}

TEST(ValidateProblemTest, KeepsSumsBelowTwoToThe63) {
  auto problem = ParseProblemJson(ProblemText(""));
  ASSERT_TRUE(problem.ok());
  problem->memory_limit_bytes = {kMostQuantity, kMostQuantity};
  problem->sweeps[1].after.clear();
  Stage& stage = problem->sweeps[1].stages[0];
  stage.choices.Mutable()[0].forward_ns = kMostQuantity;
  EXPECT_TRUE(ValidateProblem(*problem).ok());
  stage.choices.Mutable().resize(10, stage.choices[0]);
  const absl::Status status = ValidateProblem(*problem);
  EXPECT_NE(status.message().find("2^63"), std::string::npos) << status;
  for (Choice& choice : stage.choices.Mutable()) {
    choice.forward_ns = 1;
    choice.activation_bytes = kMostQuantity;
  }
  EXPECT_NE(ValidateProblem(*problem).message().find("rank 1"),
            std::string::npos);
}

TEST(ParseProblemJsonTest, FindsCircles) {
  auto problem = ParseProblemJson(ProblemText(""));
  ASSERT_TRUE(problem.ok());
  problem->sweeps[0].after = {1};
  EXPECT_NE(ValidateProblem(*problem).message().find("circle"),
            std::string::npos);
}

TEST(ParseScheduleJsonTest, TakesTheChoiceFromF) {
  const auto problem = ParseProblemJson(ProblemText(""));
  ASSERT_TRUE(problem.ok());
  const auto schedule = ParseScheduleJson(
      *problem,
      "{\"ranks\": [[{\"kind\": \"F\", \"segment\": \"a\", \"stage\": 0}],"
      " [{\"kind\": \"W\", \"segment\": \"b\", \"stage\": \"0\", "
      "\"choice\": 99}]]}");
  ASSERT_TRUE(schedule.ok()) << schedule.status();
  EXPECT_EQ(schedule->ranks[1][0].kind, StageKind::kWeightGrad);
  EXPECT_EQ(schedule->ranks[1][0].choice, 0);
  for (const char* row :
       {"{\"kind\": \"X\", \"segment\": \"a\", \"stage\": 0}",
        "{\"kind\": \"F\", \"segment\": \"z\", \"stage\": 0}",
        "{\"kind\": \"F\", \"segment\": \"a\", \"stage\": 1}",
        "{\"kind\": \"F\", \"segment\": \"b\", \"stage\": 0}",
        "{\"kind\": \"F\", \"segment\": \"a\", \"stage\": 0, \"choice\": 1}",
        "7"}) {
    EXPECT_FALSE(ParseScheduleJson(
                     *problem, "{\"ranks\": [[" + std::string(row) + "], []]}")
                     .ok())
        << row;
  }
}

TEST(ScheduleToJsonTest, TimesMayNeedAll64Bits) {
  const auto problem = ParseProblemJson(ProblemText(""));
  ASSERT_TRUE(problem.ok());
  Schedule schedule;
  schedule.ranks = {{{StageKind::kForward, 0, 0, 0}}, {}};
  StageTimes times;
  constexpr uint64_t kStart = uint64_t{1} << 63;
  times.ranks = {
      {{static_cast<int64_t>(kStart), static_cast<int64_t>(kStart + 7)}}, {}};
  const std::string text = ScheduleToJson(*problem, schedule, times, {});
  EXPECT_NE(text.find("\"start_ns\": 9223372036854775808, "
                      "\"end_ns\": 9223372036854775815"),
            std::string::npos)
      << text;
}

}  // namespace
}  // namespace pipeweaver::search
