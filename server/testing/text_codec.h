// A codec without protobuf, for tests of the core.

#ifndef SERVER_TESTING_TEXT_CODEC_H_
#define SERVER_TESTING_TEXT_CODEC_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/plan_codec.h"

namespace pipeweaver::server {

// Writes what a plan was made from as text.
class TextCodec final : public PlanCodec {
 public:
  std::string LayoutDigest(const semu::Job& job,
                           const semu::Layout& layout) const override {
    return absl::StrCat(
        "layout of ", job.name, " ",
        layout.modules.empty() ? 0 : layout.modules[0].sub_microbatch_tokens);
  }

  std::string ProfileDigest(const search::PlannableJob& job) const override {
    return absl::StrCat(job.costs->Fingerprint(), " reserve ",
                        absl::StrJoin(job.extra_reserve_bytes, ","));
  }

  absl::StatusOr<SealedPlan> Seal(const search::PlannableJob& job,
                                  std::shared_ptr<const search::StepPlan> plan,
                                  const PlanIdentity& identity,
                                  const PlanTimings&,
                                  search::WorkerPool*) const override {
    SealedPlan sealed;
    sealed.identity = identity;
    sealed.plan_digest =
        absl::StrCat(DebugString(identity.key), " makespan ",
                     plan->report.makespan_ns, " by ", plan->report.strategy,
                     " origin ", static_cast<int>(identity.origin), " seed ",
                     identity.seed, " after ", identity.warm_start_digest);
    sealed.plan_bytes = sealed.plan_digest;
    for (int rank = 0; rank < job.job.parallelism.pipeline_parallel; ++rank) {
      sealed.programs.push_back(
          absl::StrCat(sealed.plan_digest, " rank ", rank));
    }
    sealed.plan = std::move(plan);
    return sealed;
  }

  absl::StatusOr<std::vector<SealedPlan>> SealDealt(
      const search::PlannableJob& job, const search::DealtBatches& dealt,
      const std::vector<UnsealedPlan>& plans,
      search::WorkerPool* workers) const override {
    std::vector<SealedPlan> all;
    for (size_t r = 0; r < plans.size(); ++r) {
      all.push_back(*Seal(job, plans[r].plan, plans[r].identity,
                          plans[r].timings, workers));
      all.back().moved = true;
      for (const search::MicrobatchOrigin& origin : dealt.moves[r]) {
        absl::StrAppend(&all.back().plan_bytes, " from ", origin.replica, "/",
                        origin.microbatch);
      }
    }
    return all;
  }
};

}  // namespace pipeweaver::server

#endif  // SERVER_TESTING_TEXT_CODEC_H_
