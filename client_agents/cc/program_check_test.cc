#include "client_agents/cc/program_check.h"

#include <functional>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/digest/digest.h"

namespace pipeweaver::client {
namespace {

using ::testing::HasSubstr;

void Add(v1::ActionColumns& a, v1::ActionKind kind, int transfer = 0,
         int peer = 0, int choice = 0) {
  a.add_kind(kind);
  a.add_sub_microbatch(0);
  a.add_segment(0);
  a.add_chunk(0);
  a.add_choice(choice);
  a.add_transfer(transfer);
  a.add_peer(peer);
  a.add_bytes(0);
  a.add_edge_sub_microbatch(0);
  a.add_start_delta_ns(0);
  a.add_duration_ns(0);
  a.add_gradient(false);
}

// Rank 0 of 2: one stage pair whose output goes to rank 1.
v1::ActionColumns MakeActions() {
  v1::ActionColumns a;
  Add(a, v1::ACTION_KIND_FORWARD);
  Add(a, v1::ACTION_KIND_POST_SEND, /*transfer=*/0, /*peer=*/1);
  Add(a, v1::ACTION_KIND_POST_RECV, /*transfer=*/1, /*peer=*/1);
  Add(a, v1::ACTION_KIND_WAIT_SEND, /*transfer=*/0, /*peer=*/1);
  Add(a, v1::ACTION_KIND_WAIT_RECV, /*transfer=*/1, /*peer=*/1);
  Add(a, v1::ACTION_KIND_INPUT_GRAD);
  Add(a, v1::ACTION_KIND_WEIGHT_GRAD);
  Add(a, v1::ACTION_KIND_GRADS_READY);
  return a;
}

v1::PlanKey MakeKey() {
  v1::PlanKey key;
  key.set_job("vlm");
  key.set_attempt(1);
  key.set_step(4);
  return key;
}

v1::Program MakeProgram(const v1::ActionColumns& actions) {
  v1::BatchSplit split;
  split.add_module(0);
  split.add_microbatch(0);
  split.add_num_items(1);
  split.add_tokens(100);
  split.add_items(0);
  v1::Program program;
  *program.mutable_identity()->mutable_key() = MakeKey();
  program.set_split(split.SerializeAsString());
  program.set_actions(actions.SerializeAsString());
  v1::ChunkChoices* chunk = program.add_choices();
  chunk->add_choices();
  chunk->add_choices();
  program.add_rank_digests(Sha256(program.actions()));
  program.add_rank_digests(Sha256("rank 1"));
  program.set_plan_digest(
      PlanDigest(program.identity(), program.split(),
                 {program.rank_digests(0), program.rank_digests(1)}));
  return program;
}

std::string ErrorAfter(const std::function<void(v1::ActionColumns&)>& change) {
  v1::ActionColumns actions = MakeActions();
  change(actions);
  const auto checked = CheckProgram(MakeProgram(actions), MakeKey(), 0);
  if (checked.ok()) return "";
  EXPECT_EQ(checked.status().code(), absl::StatusCode::kDataLoss);
  return std::string(checked.status().message());
}

TEST(ProgramCheckTest, AcceptsAWholeProgram) {
  const auto checked = CheckProgram(MakeProgram(MakeActions()), MakeKey(), 0);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_EQ(checked->actions.kind_size(), 8);
  EXPECT_EQ(checked->split.tokens(0), 100);
}

TEST(ProgramCheckTest, RefusesAnotherKeyOrRank) {
  v1::PlanKey other = MakeKey();
  other.set_step(5);
  EXPECT_THAT(
      CheckProgram(MakeProgram(MakeActions()), other, 0).status().message(),
      HasSubstr("identity.key"));
  EXPECT_THAT(
      CheckProgram(MakeProgram(MakeActions()), MakeKey(), 1).status().message(),
      HasSubstr("rank: 0, asked for 1"));
}

TEST(ProgramCheckTest, RefusesACorruptedProgram) {
  v1::Program program = MakeProgram(MakeActions());
  program.mutable_actions()->back() ^= 1;
  EXPECT_THAT(CheckProgram(program, MakeKey(), 0).status().message(),
              HasSubstr("SHA-256"));
}

TEST(ProgramCheckTest, NamesTheColumnThatBreaksARule) {
  EXPECT_THAT(ErrorAfter([](auto& a) { a.add_choice(1); }),
              HasSubstr("actions.choice: 9 values"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_sub_microbatch(0, 1); }),
              HasSubstr("actions.sub_microbatch[0]: 1: must be below 1"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_sub_microbatch(7, 1); }),
              HasSubstr("actions.sub_microbatch[7]: 1: must be below 1"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_edge_sub_microbatch(1, 2); }),
              HasSubstr("actions.edge_sub_microbatch[1]: 2: must be at most"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_segment(1, 1); }),
              HasSubstr("actions.chunk[1]: 0: no chunk of `choices` is it"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_chunk(0, 3); }),
              HasSubstr("actions.chunk[0]: 3: no chunk of `choices` is it"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_choice(0, 2); }),
              HasSubstr("actions.choice[0]: 2: must be below its chunk's"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_peer(1, 2); }),
              HasSubstr("actions.peer[1]: 2: must be another rank below 2"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_peer(1, 0); }),
              HasSubstr("actions.peer[1]: 0"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_transfer(2, 0); }),
              HasSubstr("ascending"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_transfer(4, 7); }),
              HasSubstr("waited for, but not posted"));
  EXPECT_THAT(
      ErrorAfter([](auto& a) { a.set_kind(4, v1::ACTION_KIND_FORWARD); }),
      HasSubstr("the forward runs twice"));
  EXPECT_THAT(
      ErrorAfter([](auto& a) { a.set_kind(5, v1::ACTION_KIND_WEIGHT_GRAD); }),
      HasSubstr("comes before its input gradient"));
  EXPECT_THAT(ErrorAfter([](auto& a) { a.set_choice(6, 1); }),
              HasSubstr("is not its forward's"));
  EXPECT_THAT(
      ErrorAfter([](auto& a) { a.set_kind(4, v1::ACTION_KIND_GRADS_READY); }),
      HasSubstr("posted, but never waited for"));
}

// Replica 0 of 2; its only microbatch is replica 1's second.
std::string MovesError(const std::function<void(v1::Program&)>& change) {
  v1::Program program = MakeProgram(MakeActions());
  v1::MicrobatchMoves* moves = program.mutable_moves();
  moves->add_num_microbatches(1);
  moves->add_num_microbatches(2);
  for (const auto& [replica, microbatch] :
       {std::pair(1, 1), std::pair(0, 0), std::pair(1, 0)}) {
    moves->add_from_replica(replica);
    moves->add_from_microbatch(microbatch);
  }
  program.mutable_batch()->add_microbatches();
  program.add_replica_plan_digests("");
  program.add_replica_plan_digests(Sha256("plan of replica 1"));
  change(program);
  v1::PlanIdentity* identity = program.mutable_identity();
  identity->set_moves_digest(CanonicalDigest(program.moves()));
  identity->set_moved_batch_digest(CanonicalDigest(program.batch()));
  program.set_plan_digest(
      PlanDigest(program.identity(), program.split(),
                 {program.rank_digests(0), program.rank_digests(1)}));
  program.set_replica_plan_digests(0, program.plan_digest());
  const auto checked = CheckProgram(program, MakeKey(), 0);
  if (checked.ok()) return "";
  EXPECT_EQ(checked.status().code(), absl::StatusCode::kDataLoss);
  return std::string(checked.status().message());
}

TEST(ProgramCheckTest, EachMovedMicrobatchStandsInOnePlace) {
  EXPECT_EQ(MovesError([](v1::Program&) {}), "");
  EXPECT_THAT(
      MovesError([](auto& p) { p.mutable_moves()->set_from_microbatch(2, 1); }),
      HasSubstr("moves.from_microbatch[2]: 1 of replica 1: stands in "
                "two places"));
  EXPECT_THAT(
      MovesError([](auto& p) { p.mutable_moves()->set_from_microbatch(1, 1); }),
      HasSubstr("1 of replica 0: does not exist"));
  EXPECT_THAT(
      MovesError([](auto& p) { p.mutable_moves()->set_from_replica(0, 2); }),
      HasSubstr("1 of replica 2: does not exist"));
  EXPECT_THAT(
      MovesError([](auto& p) { p.mutable_moves()->add_from_replica(0); }),
      HasSubstr("4 and 3 values, must be the sum of num_microbatches: 3"));
  EXPECT_THAT(
      MovesError([](auto& p) { p.mutable_moves()->add_num_microbatches(0); }),
      HasSubstr("3 replicas, must be as many as"));
  EXPECT_THAT(
      MovesError([](auto& p) { p.mutable_batch()->add_microbatches(); }),
      HasSubstr("batch.microbatches: 2, must be as many as the replica trains "
                "on: 1"));
  EXPECT_THAT(
      MovesError([](auto& p) { p.set_replica_plan_digests(1, "short"); }),
      HasSubstr("replica_plan_digests[1]: 5 bytes, must be 32"));
}

}  // namespace
}  // namespace pipeweaver::client
