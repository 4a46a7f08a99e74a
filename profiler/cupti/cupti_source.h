// Activities from NVIDIA's CUPTI. This and its source are the only files that
// know cupti.h; the library is opened at run time.

#ifndef PROFILER_CUPTI_CUPTI_SOURCE_H_
#define PROFILER_CUPTI_CUPTI_SOURCE_H_

#include <memory>
#include <string>

#include "profiler/cupti/activity.h"

namespace pipeweaver::cupti {

// Opens libcupti: `library` if given, else the one that the process has, else
// the usual names. Null with a reason if there is none, or it lacks a function.
std::unique_ptr<ActivitySource> OpenCupti(const std::string& library,
                                          std::string* reason);

// Whether there are a CUDA driver and a device of NVIDIA's. Without them
// libcupti is not to be called: that of CUDA 13.2 overflows the stack then.
bool HasGpu(std::string* reason);

}  // namespace pipeweaver::cupti

#endif  // PROFILER_CUPTI_CUPTI_SOURCE_H_
