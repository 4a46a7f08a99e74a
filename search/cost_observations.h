// What a rank's measured program says of layer costs: the bridge from executed
// steps to calibration.

#ifndef SEARCH_COST_OBSERVATIONS_H_
#define SEARCH_COST_OBSERVATIONS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "search/planner.h"
#include "semu/cost/calibration/calibration.h"
#include "semu/cost/cost_model.h"

namespace pipeweaver::search {

// One observation a computing action of the rank's program: its time by `costs`
// in the parts that calibration corrects, against `duration_ns` of it (one an
// action, nanoseconds). At most `most` of them, spread evenly over the program;
// others for another `turn`, so that over some turns all are seen.
//
// REQUIRES: `plan` was made for `job`; `rank` and the durations fit its
// programs; most >= 1, turn >= 0.
std::vector<semu::CostObservation> ObserveCosts(
    const PlannableJob& job, const StepPlan& plan, int rank,
    absl::Span<const int64_t> duration_ns, const semu::CostModel& costs,
    int most, int64_t turn);

}  // namespace pipeweaver::search

#endif  // SEARCH_COST_OBSERVATIONS_H_
