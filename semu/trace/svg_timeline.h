// A timeline as an SVG picture: a lane a rank, a colour a module, a shade a
// kind of stage, idle time hatched, memory as a line below each lane.

#ifndef SEMU_TRACE_SVG_TIMELINE_H_
#define SEMU_TRACE_SVG_TIMELINE_H_

#include <string>

#include "semu/trace/timeline.h"

namespace pipeweaver::semu {

struct SvgOptions {
  // Of the whole picture, in pixels; wider pictures label more stages. 0: wide
  // enough to label most stages, within 1200 .. 3200.
  int width = 0;
};

// Equal timelines give equal bytes.
std::string SvgTimeline(const Timeline& timeline, const SvgOptions& options);

}  // namespace pipeweaver::semu

#endif  // SEMU_TRACE_SVG_TIMELINE_H_
