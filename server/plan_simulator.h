// What-if questions about a sealed plan, answered by the step emulator.

#ifndef SERVER_PLAN_SIMULATOR_H_
#define SERVER_PLAN_SIMULATOR_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "search/planner.h"
#include "server/planner_service.h"

namespace pipeweaver::server {

// The SimulateFunction of the real server. Thread-safe.
absl::StatusOr<std::vector<int64_t>> SimulatePlan(
    const search::PlannableJob& job, const search::StepPlan& plan,
    const Simulation& simulation, const std::atomic<bool>& cancelled);

}  // namespace pipeweaver::server

#endif  // SERVER_PLAN_SIMULATOR_H_
