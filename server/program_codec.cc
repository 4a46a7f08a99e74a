// See program_codec.h.

#include "server/program_codec.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/digest/digest.h"
#include "search/lower/program_proto.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"

namespace pipeweaver::server {
namespace {

v1::PlanIdentity IdentityToProto(const PlanIdentity& identity) {
  v1::PlanIdentity proto;
  v1::PlanKey* key = proto.mutable_key();
  key->set_job(identity.key.job);
  key->set_attempt(identity.key.attempt);
  key->set_step(identity.key.step);
  key->set_replica(identity.key.replica);
  proto.set_job_digest(identity.job_digest);
  proto.set_layout_digest(identity.layout_digest);
  proto.set_batch_digest(identity.batch_digest);
  proto.set_profile_digest(identity.profile_digest);
  proto.set_seed(identity.seed);
  proto.set_budget_evaluations(identity.budget_evaluations);
  proto.set_warm_start_digest(identity.warm_start_digest);
  proto.set_origin(static_cast<v1::PlanOrigin>(identity.origin));
  if (!identity.joint_batch_digests.empty()) {
    proto.set_joint_digest(Sha256(identity.joint_batch_digests));
  }
  proto.set_duration_noise_millionths(
      static_cast<uint32_t>(std::lround(1e6 * identity.duration_noise)));
  return proto;
}

v1::MicrobatchMoves MovesToProto(const search::MicrobatchMoves& moves) {
  v1::MicrobatchMoves proto;
  for (const std::vector<search::MicrobatchOrigin>& replica : moves) {
    proto.add_num_microbatches(static_cast<uint32_t>(replica.size()));
    for (const search::MicrobatchOrigin& origin : replica) {
      proto.add_from_replica(origin.replica);
      proto.add_from_microbatch(origin.microbatch);
    }
  }
  return proto;
}

}  // namespace

v1::PlanReport ReportToProto(const search::StepReport& report) {
  v1::PlanReport proto;
  proto.set_makespan_ns(report.makespan_ns);
  proto.set_schedule_makespan_ns(report.schedule_makespan_ns);
  proto.set_lower_bound_ns(report.lower_bound_ns);
  proto.set_flow_lower_bound_ns(report.flow_lower_bound_ns);
  proto.set_layout_free_bound_ns(report.layout_free_bound_ns);
  proto.set_gap(report.Gap());
  proto.set_bubble_ratio(report.bubble_ratio);
  proto.set_expected_makespan_ns(report.expected_makespan_ns);
  v1::BubbleCauses* bubbles = proto.mutable_bubbles();
  bubbles->set_imbalance_ns(report.bubbles.imbalance_ns);
  bubbles->set_dependency_ns(report.bubbles.dependency_ns);
  bubbles->set_memory_ns(report.bubbles.memory_ns);
  bubbles->set_transfer_ns(report.bubbles.transfer_ns);
  proto.mutable_peak_memory_bytes()->Add(report.peak_memory_bytes.begin(),
                                         report.peak_memory_bytes.end());
  proto.set_measured_share(report.measured_share);
  proto.set_strategy(report.strategy);
  proto.set_evaluations(report.evaluations);
  proto.set_search_ns(report.search_ns);
  proto.set_check_ns(report.check_ns);
  proto.set_lower_ns(report.lower_ns);
  // A StepPlan exists only once both checkers have passed on it.
  proto.set_certified(true);
  return proto;
}

namespace {

// Serialises programs, and fills `proto` in, whose identity is there already.
SealedPlan Serialize(const UnsealedPlan& unsealed, search::WorkerPool* workers,
                     v1::Plan& proto) {
  const search::StepPlan& plan = *unsealed.plan;
  proto.mutable_identity()->mutable_search_settings()->Add(
      plan.settings.begin(), plan.settings.end());
  search::PlanBytes bytes = search::SerializePlan(plan.step, plan.programs,
                                                  proto.identity(), workers);
  proto.set_plan_digest(bytes.plan_digest);
  *proto.mutable_report() = ReportToProto(plan.report);
  proto.mutable_report()->set_queue_ns(unsealed.timings.queue_ns.value_or(0));
  proto.mutable_report()->set_submit_to_seal_ns(
      unsealed.timings.submit_to_seal_ns);
  for (const std::string& program : bytes.programs) {
    proto.add_program_bytes(program.size());
  }
  SealedPlan sealed;
  sealed.identity = unsealed.identity;
  sealed.plan_digest = std::move(bytes.plan_digest);
  sealed.programs = std::move(bytes.programs);
  sealed.plan = unsealed.plan;
  return sealed;
}

}  // namespace

std::string ProgramCodec::LayoutDigest(const semu::Job& job,
                                       const semu::Layout& layout) const {
  return CanonicalDigest(semu::LayoutToProto(layout, job));
}

std::string ProgramCodec::ProfileDigest(const search::PlannableJob& job) const {
  std::string text = job.costs == nullptr ? "" : job.costs->Fingerprint();
  if (!job.extra_reserve_bytes.empty()) {
    absl::StrAppend(&text, " reserve ",
                    absl::StrJoin(job.extra_reserve_bytes, ","));
  }
  return Sha256(text);
}

absl::StatusOr<SealedPlan> ProgramCodec::Seal(
    const search::PlannableJob&, std::shared_ptr<const search::StepPlan> plan,
    const PlanIdentity& identity, const PlanTimings& timings,
    search::WorkerPool* workers) const {
  v1::Plan proto;
  *proto.mutable_identity() = IdentityToProto(identity);
  SealedPlan sealed =
      Serialize({std::move(plan), identity, timings}, workers, proto);
  sealed.plan_bytes = CanonicalBytes(proto);
  return sealed;
}

absl::StatusOr<std::vector<SealedPlan>> ProgramCodec::SealDealt(
    const search::PlannableJob& job, const search::DealtBatches& dealt,
    const std::vector<UnsealedPlan>& plans, search::WorkerPool* workers) const {
  // What every program has beside that of a plan without moves; fields with
  // higher numbers, so that it may stand behind.
  v1::Program more;
  *more.mutable_moves() = MovesToProto(dealt.moves);
  const std::string moves_digest = CanonicalDigest(more.moves());
  std::vector<SealedPlan> all;
  std::vector<v1::Plan> protos(plans.size());
  for (size_t r = 0; r < plans.size(); ++r) {
    v1::Plan& proto = protos[r];
    *proto.mutable_batch() = semu::BatchToProto(dealt.batches[r], job.job);
    *proto.mutable_identity() = IdentityToProto(plans[r].identity);
    proto.mutable_identity()->set_moves_digest(moves_digest);
    proto.mutable_identity()->set_moved_batch_digest(
        CanonicalDigest(proto.batch()));
    all.push_back(Serialize(plans[r], workers, proto));
    all.back().moved = true;
    more.add_replica_plan_digests(all.back().plan_digest);
  }
  for (size_t r = 0; r < plans.size(); ++r) {
    v1::Plan& proto = protos[r];
    *more.mutable_batch() = proto.batch();
    *proto.mutable_moves() = more.moves();
    *proto.mutable_replica_plan_digests() = more.replica_plan_digests();
    const std::string tail = CanonicalBytes(more);
    for (size_t rank = 0; rank < all[r].programs.size(); ++rank) {
      all[r].programs[rank] += tail;
      proto.set_program_bytes(static_cast<int>(rank),
                              all[r].programs[rank].size());
    }
    all[r].plan_bytes = CanonicalBytes(proto);
  }
  return all;
}

}  // namespace pipeweaver::server
