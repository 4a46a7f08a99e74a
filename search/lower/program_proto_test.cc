// Programs come back from their bytes as they went; broken bytes are refused.

#include "search/lower/program_proto.h"

#include <functional>
#include <limits>
#include <random>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/digest/digest.h"
#include "search/lower/lower.h"
#include "search/plan/plan_checker.h"
#include "search/plan/testing/random_problem.h"
#include "search/strategy/worker_pool.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

v1::PlanIdentity Identity() {
  v1::PlanIdentity identity;
  identity.mutable_key()->set_job("vlm");
  identity.mutable_key()->set_step(7);
  identity.set_seed(3);
  identity.set_origin(v1::PLAN_ORIGIN_SEARCH_FINISHED);
  return identity;
}

struct Lowered {
  StepProblem step;
  StepPrograms programs;
};

Lowered RandomLowered(std::mt19937_64& random) {
  Lowered lowered;
  lowered.step = testing::RandomStepProblem(random);
  const Schedule schedule =
      testing::RandomSchedule(lowered.step.problem, random);
  const auto checked = CheckSchedule(lowered.step.problem, schedule);
  lowered.programs = *Lower(lowered.step, schedule, checked->times,
                            {lowered.step.problem.memory_limit_bytes, 2});
  return lowered;
}

TEST(ProgramProtoTest, ComesBackAsItWent) {
  std::mt19937_64 random(1);
  WorkerPool pool(3);
  for (int i = 0; i < 200; ++i) {
    const auto [step, programs] = RandomLowered(random);
    const PlanBytes bytes = SerializePlan(step, programs, Identity());
    EXPECT_EQ(bytes.programs,
              SerializePlan(step, programs, Identity(), &pool).programs);
    ASSERT_EQ(bytes.programs.size(), programs.ranks.size());
    for (int r = 0; r < step.problem.ranks; ++r) {
      const auto parsed = ParseProgram(bytes.programs[r]);
      ASSERT_TRUE(parsed.ok()) << parsed.status();
      // The bytes are those that protobuf would have written.
      v1::Program program;
      v1::ActionColumns columns;
      ASSERT_TRUE(program.ParseFromString(bytes.programs[r]));
      ASSERT_TRUE(columns.ParseFromString(program.actions()));
      EXPECT_EQ(program.SerializeAsString(), bytes.programs[r]);
      EXPECT_EQ(columns.SerializeAsString(), program.actions());
      EXPECT_EQ(parsed->plan_digest, bytes.plan_digest);
      EXPECT_EQ(parsed->rank, r);
      EXPECT_EQ(parsed->num_ranks, step.problem.ranks);
      EXPECT_EQ(parsed->identity.seed(), 3);
      ASSERT_EQ(parsed->rows.size(), programs.ranks[r].size());
      for (size_t k = 0; k < parsed->rows.size(); ++k) {
        const ProgramRow& row = parsed->rows[k];
        const Action& a = programs.ranks[r][k];
        const SweepOrigin& origin = step.sweeps[a.sweep];
        EXPECT_EQ(row.kind, a.kind);
        EXPECT_EQ(row.sub_microbatch, origin.sub_microbatch);
        EXPECT_EQ(row.module,
                  step.sub_microbatches[origin.sub_microbatch].module);
        EXPECT_EQ(row.segment, origin.segment);
        EXPECT_EQ(row.chunk, a.stage);
        EXPECT_EQ(row.start_ns, a.start_ns);
        EXPECT_EQ(row.end_ns, a.end_ns);
        if (a.transfer < 0) continue;
        const Transfer& x = programs.transfers[a.transfer];
        EXPECT_EQ(row.transfer, a.transfer);
        EXPECT_EQ(row.peer, x.from_rank == r ? x.to_rank : x.from_rank);
        EXPECT_EQ(row.gradient, x.gradient);
        const int other =
            step.sweeps[x.from_rank == r ? x.to_sweep : x.from_sweep]
                .sub_microbatch;
        const bool within_module =
            step.sub_microbatches[other].module ==
            step.sub_microbatches[origin.sub_microbatch].module;
        EXPECT_EQ(row.edge_sub_microbatch, within_module ? 0 : other + 1);
      }
    }
  }
}

TEST(ProgramProtoTest, ListsTheChoicesOfTheRanksChunks) {
  std::mt19937_64 random(2);
  const auto [step, programs] = RandomLowered(random);
  const PlanBytes bytes = SerializePlan(step, programs, Identity());
  for (int r = 0; r < step.problem.ranks; ++r) {
    v1::Program program;
    ASSERT_TRUE(program.ParseFromString(bytes.programs[r]));
    for (const v1::ChunkChoices& chunk : program.choices()) {
      EXPECT_EQ(
          chunk.choices_size(),
          step.choices[chunk.module()][chunk.segment()][chunk.chunk()].size());
    }
    for (const Action& a : programs.ranks[r]) {
      const SweepOrigin& origin = step.sweeps[a.sweep];
      int found = 0;
      for (const v1::ChunkChoices& chunk : program.choices()) {
        found += static_cast<int>(chunk.module()) ==
                     step.sub_microbatches[origin.sub_microbatch].module &&
                 static_cast<int>(chunk.segment()) == origin.segment &&
                 static_cast<int>(chunk.chunk()) == a.stage;
      }
      EXPECT_EQ(found, 1);
    }
  }
}

// Seals a program again after its columns were changed, so that only the
// columns are wrong.
std::string Resealed(
    const std::string& bytes,
    const std::function<void(v1::ActionColumns&, v1::BatchSplit&)>& change) {
  v1::Program program;
  EXPECT_TRUE(program.ParseFromString(bytes));
  v1::ActionColumns columns;
  EXPECT_TRUE(columns.ParseFromString(program.actions()));
  v1::BatchSplit split;
  EXPECT_TRUE(split.ParseFromString(program.split()));
  change(columns, split);
  program.set_actions(columns.SerializeAsString());
  program.set_split(split.SerializeAsString());
  program.set_rank_digests(static_cast<int>(program.rank()),
                           Sha256(program.actions()));
  program.set_plan_digest(PlanDigest(
      program.identity(), program.split(),
      {program.rank_digests().begin(), program.rank_digests().end()}));
  return program.SerializeAsString();
}

TEST(ProgramProtoTest, NamesWhatIsWrongInTheColumns) {
  // The first program that has an action and a transfer.
  std::mt19937_64 random(3);
  std::string bytes;
  int post = -1;
  while (post < 0) {
    const auto [step, programs] = RandomLowered(random);
    bytes = SerializePlan(step, programs, Identity()).programs[0];
    for (size_t i = 0; i < programs.ranks[0].size(); ++i) {
      if (programs.ranks[0][i].kind == ActionKind::kPostSend) {
        post = static_cast<int>(i);
      }
    }
  }
  struct Breakage {
    std::string message;
    std::function<void(v1::ActionColumns&, v1::BatchSplit&)> change;
  };
  const std::vector<Breakage> breakages = {
      {"program.actions.chunk: ",
       [](auto& c, auto&) { c.mutable_chunk()->RemoveLast(); }},
      {"program.actions.gradient: ",
       [](auto& c, auto&) { c.add_gradient(true); }},
      {"program.split.microbatch: ",
       [](auto&, auto& s) { s.add_microbatch(0); }},
      {"program.split.module[0]: 64, must be below 64",
       [](auto&, auto& s) { s.set_module(0, 64); }},
      {"program.split.module[0]: 4294967295, must be below 64",
       [](auto&, auto& s) { s.set_module(0, 4294967295u); }},
      {"program.split.microbatch[0]: 4096, must be below 4096",
       [](auto&, auto& s) { s.set_microbatch(0, 4096); }},
      {"program.actions.bytes[0]: 9223372036854775808, must be below 2^63",
       [](auto& c, auto&) { c.set_bytes(0, uint64_t{1} << 63); }},
      {"program.actions.kind[0]: 0, is no ActionKind",
       [](auto& c, auto&) { c.set_kind(0, v1::ACTION_KIND_UNSPECIFIED); }},
      {"program.actions.kind[0]: 99, is no ActionKind",
       [](auto& c, auto&) { c.set_kind(0, static_cast<v1::ActionKind>(99)); }},
      {"program.actions.kind[0]: -2147483648, is no ActionKind",
       [](auto& c, auto&) {
         c.set_kind(0, static_cast<v1::ActionKind>(
                           std::numeric_limits<int32_t>::min()));
       }},
      {"program.actions.sub_microbatch[0]: 4294967295, must be below",
       [](auto& c, auto&) { c.set_sub_microbatch(0, 4294967295u); }},
      {"must be another rank below",
       [&](auto& c, auto&) { c.set_peer(post, 0); }},
      {"must be another rank below",
       [&](auto& c, auto&) { c.set_peer(post, 1000); }},
      {"program.actions.start_delta_ns[0]: -1, the start must stay",
       [](auto& c, auto&) { c.set_start_delta_ns(0, -1); }},
      {"program.actions.duration_ns[0]: 18446744073709551615, the end must",
       [](auto& c, auto&) { c.set_duration_ns(0, ~uint64_t{0}); }},
      {"program.actions.edge_sub_microbatch[0]: 1000000, must be at most",
       [](auto& c, auto&) { c.set_edge_sub_microbatch(0, 1000000); }},
  };
  ASSERT_TRUE(ParseProgram(Resealed(bytes, [](auto&, auto&) {})).ok());
  for (const Breakage& breakage : breakages) {
    const auto parsed = ParseProgram(Resealed(bytes, breakage.change));
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(parsed.status().message()),
                HasSubstr(breakage.message));
  }
}

TEST(ProgramProtoTest, NeverCrashesOnGarbage) {
  std::mt19937_64 random(4);
  const auto [step, programs] = RandomLowered(random);
  const std::string bytes =
      SerializePlan(step, programs, Identity()).programs[0];
  for (int i = 0; i < 3000; ++i) {
    std::string broken = bytes;
    for (int64_t k = testing::Uniform(random, 1, 4); k > 0; --k) {
      broken[testing::Uniform(random, 0,
                              static_cast<int64_t>(broken.size()) - 1)] ^=
          static_cast<char>(testing::Uniform(random, 1, 255));
    }
    if (i % 3 == 0) broken.resize(broken.size() / 2);
    const auto parsed = ParseProgram(broken);
    if (!parsed.ok()) {
      EXPECT_TRUE(absl::IsInvalidArgument(parsed.status()) ||
                  absl::IsDataLoss(parsed.status()));
    }
  }
}

}  // namespace
}  // namespace pipeweaver::search
