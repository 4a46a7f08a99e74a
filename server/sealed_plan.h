// The sealed plan of a step: the value that every read returns. Plain types
// only; plan_codec.h is the wall towards protobuf.

#ifndef SERVER_SEALED_PLAN_H_
#define SERVER_SEALED_PLAN_H_

#include <compare>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "search/planner.h"

namespace pipeweaver::server {

struct CostVersion;

// Names one plan; see PlanKey in plan.proto.
struct StepKey {
  std::string job;
  uint64_t attempt = 0;
  uint64_t step = 0;
  uint32_t replica = 0;

  auto operator<=>(const StepKey&) const = default;
};

// For messages: "job 'vlm', attempt 1, step 7, replica 0".
std::string DebugString(const StepKey& key);

// How a plan came to be sealed; values are those of PlanOrigin in plan.proto.
enum class PlanOrigin {
  kSearchFinished = 1,
  kSearchCut = 2,
  kCached = 3,
  kSafe = 4,
};
constexpr int kNumPlanOrigins = 5;  // value 0 is not used

// What a plan was made from; see PlanIdentity in plan.proto.
struct PlanIdentity {
  StepKey key;
  std::string job_digest;
  std::string layout_digest;
  std::string batch_digest;
  std::string profile_digest;
  uint64_t seed = 0;
  int64_t budget_evaluations = 0;
  std::string warm_start_digest;
  PlanOrigin origin = PlanOrigin::kSafe;
  // Digests of the batches planned together, in the order of replicas, nothing
  // between; empty: planned alone.
  std::string joint_batch_digests;
  double duration_noise = 0;
};

// Wall-clock figures of how a plan was made, nanoseconds.
struct PlanTimings {
  // That the step waited for a planning thread; none where its plan is no
  // thread's search: its time had come, or the search failed.
  std::optional<int64_t> queue_ns;
  int64_t submit_to_seal_ns = 0;
};

// Immutable.
struct SealedPlan {
  PlanIdentity identity;
  std::string plan_digest;
  // Serialised v1.Plan.
  std::string plan_bytes;
  // Serialised v1.Program, [rank].
  std::vector<std::string> programs;
  bool shadow = false;
  bool forward_only = false;
  // It is of other microbatches than its replica submitted.
  bool moved = false;
  // What was sealed, for warm starts, like batches and simulation.
  std::shared_ptr<const search::StepPlan> plan;
  // What it was planned with, and the version of its costs.
  std::shared_ptr<const search::PlannableJob> job;
  std::shared_ptr<const CostVersion> costs;
};

// What a step ends with: its plan, or why it has none.
using StepResult = absl::StatusOr<std::shared_ptr<const SealedPlan>>;

// Bytes that a sealed plan keeps in memory, the StepPlan included. An estimate:
// allocator overhead is not counted.
int64_t HeldBytes(const SealedPlan& sealed);

}  // namespace pipeweaver::server

#endif  // SERVER_SEALED_PLAN_H_
