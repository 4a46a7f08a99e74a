// A timeline as Chrome trace JSON, for Perfetto (ui.perfetto.dev) and
// chrome://tracing: one track a rank, flows for transfers, a memory counter a
// rank.

#ifndef SEMU_TRACE_CHROME_TRACE_H_
#define SEMU_TRACE_CHROME_TRACE_H_

#include <string>

#include "semu/trace/timeline.h"

namespace pipeweaver::semu {

// Equal timelines give equal bytes.
std::string ChromeTraceJson(const Timeline& timeline);

}  // namespace pipeweaver::semu

#endif  // SEMU_TRACE_CHROME_TRACE_H_
