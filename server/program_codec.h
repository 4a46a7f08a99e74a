// The codec of the real server: plans as plan.proto defines them.

#ifndef SERVER_PROGRAM_CODEC_H_
#define SERVER_PROGRAM_CODEC_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "pipeweaver/v1/plan.pb.h"
#include "search/planner.h"
#include "server/plan_codec.h"

namespace pipeweaver::server {

class ProgramCodec final : public PlanCodec {
 public:
  std::string LayoutDigest(const semu::Job& job,
                           const semu::Layout& layout) const override;

  std::string ProfileDigest(const search::PlannableJob& job) const override;

  absl::StatusOr<SealedPlan> Seal(const search::PlannableJob& job,
                                  std::shared_ptr<const search::StepPlan> plan,
                                  const PlanIdentity& identity,
                                  const PlanTimings& timings,
                                  search::WorkerPool* workers) const override;

  absl::StatusOr<std::vector<SealedPlan>> SealDealt(
      const search::PlannableJob& job, const search::DealtBatches& dealt,
      const std::vector<UnsealedPlan>& plans,
      search::WorkerPool* workers) const override;
};

// A plan's figures; those that a single plan has not (queue, sealing) are 0.
v1::PlanReport ReportToProto(const search::StepReport& report);

}  // namespace pipeweaver::server

#endif  // SERVER_PROGRAM_CODEC_H_
