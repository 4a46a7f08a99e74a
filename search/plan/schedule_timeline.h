// A schedule as a timeline for pictures and traces.

#ifndef SEARCH_PLAN_SCHEDULE_TIMELINE_H_
#define SEARCH_PLAN_SCHEDULE_TIMELINE_H_

#include "search/problem/problem.h"
#include "search/problem/schedule.h"
#include "semu/trace/timeline.h"

namespace pipeweaver::search {

// Spans, transfers and memory of a schedule with its times. Modules are read
// off the sweeps' ids, "microbatch/module/...", as problem files name them; a
// sweep with another id belongs to a module "stages". Title and subtitle are
// left to the caller.
//
// REQUIRES: the schedule passed CheckPlan with these times.
semu::Timeline ScheduleTimeline(const Problem& problem,
                                const Schedule& schedule,
                                const StageTimes& times);

}  // namespace pipeweaver::search

#endif  // SEARCH_PLAN_SCHEDULE_TIMELINE_H_
