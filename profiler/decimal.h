// Exact integers from the decimal text of a number.

#ifndef PROFILER_DECIMAL_H_
#define PROFILER_DECIMAL_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace pipeweaver::profiler {

// The value of `text` times 10^scale, computed in integers: no figure passes
// through a floating-point number, so that "1428625731622.25" microseconds with
// scale 3 give 1428625731622250 ns. Takes an optional sign, digits, a fraction
// and an exponent. Digits below the unit are rounded half away from zero. Empty
// for text that is no number, for NaN and infinities, and outside int64.
std::optional<int64_t> ScaledDecimal(absl::string_view text, int scale);

// `nanoseconds` as decimal microseconds without trailing zeros: 18112 ->
// "18.112".
std::string MicrosecondsText(int64_t nanoseconds);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_DECIMAL_H_
