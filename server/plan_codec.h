// The wall between the server's core and the wire format: what the core needs
// of it.

#ifndef SERVER_PLAN_CODEC_H_
#define SERVER_PLAN_CODEC_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "search/joint_planner.h"
#include "search/planner.h"
#include "semu/model/job.h"
#include "server/sealed_plan.h"

namespace pipeweaver::server {

// A plan that is to be serialised.
struct UnsealedPlan {
  std::shared_ptr<const search::StepPlan> plan;
  PlanIdentity identity;
  PlanTimings timings;
};

// Thread-safe: no state.
class PlanCodec {
 public:
  virtual ~PlanCodec() = default;

  // SHA-256 of the layout's canonical form.
  virtual std::string LayoutDigest(const semu::Job& job,
                                   const semu::Layout& layout) const = 0;

  // What plans made with the job's costs carry as profile_digest: 32 bytes that
  // are others when their fingerprint or the extra reserve is another.
  virtual std::string ProfileDigest(const search::PlannableJob& job) const = 0;

  // Serialises a plan: all fields of the answer but `shadow`, `forward_only`,
  // `job` and `costs`. The digest and the programs depend on `plan` and
  // `identity` alone, never on `timings` or `workers`, who help where they are
  // not null. `job` is the one that `plan` was made for.
  virtual absl::StatusOr<SealedPlan> Seal(
      const search::PlannableJob& job,
      std::shared_ptr<const search::StepPlan> plan,
      const PlanIdentity& identity, const PlanTimings& timings,
      search::WorkerPool* workers) const = 0;

  // Serialises the plans of a step whose microbatches were dealt out, one a
  // replica in order, each as Seal does; they also say where microbatches come
  // from, and name each other.
  virtual absl::StatusOr<std::vector<SealedPlan>> SealDealt(
      const search::PlannableJob& job, const search::DealtBatches& dealt,
      const std::vector<UnsealedPlan>& plans,
      search::WorkerPool* workers) const = 0;
};

}  // namespace pipeweaver::server

#endif  // SERVER_PLAN_CODEC_H_
