// All replicas of a step planned together: a step ends when its slowest replica
// does, so that one gets the search that the others do not need.

#ifndef SEARCH_JOINT_PLANNER_H_
#define SEARCH_JOINT_PLANNER_H_

#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "search/planner.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// Plans `batches`, one a replica. The budget of `options` is that of all
// together: evaluations are summed, the deadline is that of the last. First
// every replica gets an equal part of a half of it; what is left goes, piece
// by piece, to whichever replica is the slowest at the time, warm-started from
// its plan, until it meets its bound or pieces bring nothing any more. A budget
// of evaluations makes the plans depend on the input alone.
//
// Returns one result a replica, in order. Errors of each: those of
// StepPlanner::Plan. REQUIRES: a budget of evaluations or a deadline; default
// strategy; no jitter.
std::vector<absl::StatusOr<StepPlan>> PlanJointly(
    const StepPlanner& planner, const PlannableJob& job,
    absl::Span<const semu::Batch* const> batches, const PlanOptions& options);

// Where a microbatch came from.
struct MicrobatchOrigin {
  int replica = 0;
  int microbatch = 0;

  bool operator==(const MicrobatchOrigin&) const = default;
};

// Who trains on which microbatches, [replica][microbatch].
using MicrobatchMoves = std::vector<std::vector<MicrobatchOrigin>>;

// Deals the replicas' microbatches out anew so that all replicas have about
// equal work: as many microbatches each as before, heaviest first to the
// replica with the least work so far that still has a place. Work is the time
// of all layers at the microbatch's shapes. Within a replica they stand by
// origin. Deterministic.
MicrobatchMoves EvenOutReplicas(const semu::Job& job,
                                absl::Span<const semu::Batch* const> batches,
                                const semu::CostModel& costs);

// The batches after the moves. REQUIRES: moves of these batches.
std::vector<semu::Batch> ApplyMoves(
    absl::Span<const semu::Batch* const> batches, const MicrobatchMoves& moves);

}  // namespace pipeweaver::search

#endif  // SEARCH_JOINT_PLANNER_H_
