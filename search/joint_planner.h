// All replicas of a step planned together: a step ends when its slowest replica
// does, so that one gets the search that the others do not need.

#ifndef SEARCH_JOINT_PLANNER_H_
#define SEARCH_JOINT_PLANNER_H_

#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "search/microbatch_moves.h"
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
// StepPlanner::Plan; CANCELLED. REQUIRES: a budget of evaluations or a
// deadline; default strategy; no jitter.
std::vector<absl::StatusOr<StepPlan>> PlanJointly(
    const StepPlanner& planner, const PlannableJob& job,
    absl::Span<const semu::Batch* const> batches, const PlanOptions& options);

// Deals the replicas' microbatches out anew so that all replicas have about
// equal work: as many microbatches each as before, heaviest first to the
// replica with the least work so far that still has a place. Work is the time
// of all layers at the microbatch's shapes. Within a replica they stand by
// origin. Deterministic. Errors: those of MeanLayerTimes
// (search/partition/layout_planner.h) for a microbatch alone.
absl::StatusOr<MicrobatchMoves> EvenOutReplicas(
    const semu::Job& job, absl::Span<const semu::Batch* const> batches,
    const semu::CostModel& costs);

// The batches after the moves. REQUIRES: moves of these batches.
std::vector<semu::Batch> ApplyMoves(
    absl::Span<const semu::Batch* const> batches, const MicrobatchMoves& moves);

// The batches of a step, dealt out over its replicas.
struct DealtBatches {
  MicrobatchMoves moves;
  std::vector<semu::Batch> batches;  // [replica]
};

// Evens out the replicas of a job, and checks what comes out (see
// move_checker.h). nullopt: there is nothing to gain, since the replica with
// the most work would not get less, or batches differ in forward_only. Errors:
// those of EvenOutReplicas; INTERNAL, those of CheckMoves. Deterministic.
absl::StatusOr<std::optional<DealtBatches>> DealOut(
    const PlannableJob& job, absl::Span<const semu::Batch* const> batches);

}  // namespace pipeweaver::search

#endif  // SEARCH_JOINT_PLANNER_H_
