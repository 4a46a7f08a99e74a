#include "proto/digest/digest.h"

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"
#include "pipeweaver/v1/batch.pb.h"

namespace pipeweaver {
namespace {

v1::Program MakeProgram() {
  v1::Program program;
  program.mutable_identity()->mutable_key()->set_job("vlm");
  program.mutable_identity()->set_seed(7);
  program.set_rank(1);
  program.set_split("split");
  program.set_actions("actions of rank 1");
  program.add_rank_digests(Sha256("actions of rank 0"));
  program.add_rank_digests(Sha256("actions of rank 1"));
  program.set_plan_digest(
      PlanDigest(program.identity(), program.split(),
                 {program.rank_digests(0), program.rank_digests(1)}));
  return program;
}

TEST(DigestTest, Sha256MatchesTheStandardsVector) {
  EXPECT_EQ(absl::BytesToHexString(Sha256("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(DigestTest, CanonicalFormLeavesOutUnknownFields) {
  v1::ModuleItems items;
  items.set_module(3);
  items.add_tokens(300);
  const std::string known = CanonicalBytes(items);
  EXPECT_EQ(absl::BytesToHexString(known), "08031202ac02");
  v1::ModuleItems extended;
  // Field 100, varint 1, appended as a newer client would.
  ASSERT_TRUE(extended.ParseFromString(known + std::string("\xa0\x06\x01")));
  EXPECT_EQ(CanonicalBytes(extended), known);
}

TEST(DigestTest, CanonicalFormLeavesOutUnknownFieldsOfMessagesWithin) {
  v1::BatchMetadata batch;
  batch.add_microbatches()->add_items()->set_module(1);
  batch.add_microbatches()->add_items()->set_module(2);
  const std::string known = CanonicalBytes(batch);
  v1::ModuleItems* items = batch.mutable_microbatches(1)->mutable_items(0);
  items->GetReflection()->MutableUnknownFields(items)->AddVarint(100, 1);
  EXPECT_NE(batch.SerializeAsString(), known);
  EXPECT_EQ(CanonicalBytes(batch), known);

  v1::PlanIdentity identity;
  identity.mutable_key()->set_job("vlm");
  const std::string known_key = CanonicalBytes(identity);
  v1::PlanKey* key = identity.mutable_key();
  key->GetReflection()->MutableUnknownFields(key)->AddVarint(100, 1);
  EXPECT_EQ(CanonicalBytes(identity), known_key);
}

TEST(DigestTest, AcceptsAnUntouchedProgram) {
  EXPECT_TRUE(VerifyProgramDigests(MakeProgram()).ok());
}

TEST(DigestTest, RefusesAnyChangedPart) {
  v1::Program program = MakeProgram();
  program.set_actions("other actions");
  EXPECT_EQ(VerifyProgramDigests(program).code(), absl::StatusCode::kDataLoss);
  program = MakeProgram();
  program.set_split("other split");
  EXPECT_EQ(VerifyProgramDigests(program).code(), absl::StatusCode::kDataLoss);
  program = MakeProgram();
  program.mutable_identity()->mutable_key()->set_step(1);
  EXPECT_EQ(VerifyProgramDigests(program).code(), absl::StatusCode::kDataLoss);
  program = MakeProgram();
  program.set_rank(2);
  EXPECT_EQ(VerifyProgramDigests(program).code(), absl::StatusCode::kDataLoss);
  program = MakeProgram();
  program.set_rank(0);
  EXPECT_EQ(VerifyProgramDigests(program).code(), absl::StatusCode::kDataLoss);
}

// Replica 1 of 2, whose only microbatch replica 0 submitted.
v1::Program MakeMovedProgram() {
  v1::Program program = MakeProgram();
  program.mutable_identity()->mutable_key()->set_replica(1);
  for (const uint32_t from : {1, 0}) {
    program.mutable_moves()->add_num_microbatches(1);
    program.mutable_moves()->add_from_replica(from);
    program.mutable_moves()->add_from_microbatch(0);
  }
  program.mutable_batch()->add_microbatches();
  program.mutable_identity()->set_moves_digest(
      CanonicalDigest(program.moves()));
  program.mutable_identity()->set_moved_batch_digest(
      CanonicalDigest(program.batch()));
  program.set_plan_digest(
      PlanDigest(program.identity(), program.split(),
                 {program.rank_digests(0), program.rank_digests(1)}));
  program.add_replica_plan_digests(Sha256("plan of replica 0"));
  program.add_replica_plan_digests(program.plan_digest());
  return program;
}

TEST(DigestTest, ThePlansDigestCoversMovesAndBatch) {
  const v1::Program program = MakeMovedProgram();
  EXPECT_TRUE(VerifyProgramDigests(program).ok());
  using Change = void (*)(v1::Program*);
  for (const Change change : std::vector<Change>{
           [](v1::Program* p) { p->clear_moves(); },
           [](v1::Program* p) { p->mutable_moves()->set_from_replica(0, 0); },
           [](v1::Program* p) { p->clear_batch(); },
           [](v1::Program* p) { p->mutable_batch()->set_forward_only(true); },
           [](v1::Program* p) { p->mutable_identity()->clear_moves_digest(); },
           [](v1::Program* p) { p->clear_replica_plan_digests(); },
           [](v1::Program* p) {
             p->mutable_replica_plan_digests()->SwapElements(0, 1);
           }}) {
    v1::Program changed = program;
    change(&changed);
    EXPECT_EQ(VerifyProgramDigests(changed).code(),
              absl::StatusCode::kDataLoss);
  }
  v1::Program unmoved = MakeProgram();
  unmoved.add_replica_plan_digests(unmoved.plan_digest());
  EXPECT_EQ(VerifyProgramDigests(unmoved).code(), absl::StatusCode::kDataLoss);
}

TEST(DigestTest, ReplicasAgreeOnMovesAndAllPlans) {
  EXPECT_EQ(AgreementDigest(MakeProgram()), "");
  const v1::Program program = MakeMovedProgram();
  EXPECT_EQ(AgreementDigest(program), Sha256(program.identity().moves_digest() +
                                             program.replica_plan_digests(0) +
                                             program.replica_plan_digests(1)));
}

}  // namespace
}  // namespace pipeweaver
