// Exact integers from the decimal text of a number.

#include "profiler/decimal.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"

namespace pipeweaver::profiler {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

std::optional<int64_t> ScaledDecimal(absl::string_view text, int scale) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t'))
    text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t'))
    text.remove_suffix(1);
  bool negative = false;
  if (!text.empty() && (text.front() == '-' || text.front() == '+')) {
    negative = text.front() == '-';
    text.remove_prefix(1);
  }

  const std::size_t mantissa_end =
      std::min(text.find_first_of("eE"), text.size());
  absl::string_view mantissa = text.substr(0, mantissa_end);
  int64_t exponent = 0;
  if (mantissa_end < text.size()) {
    absl::string_view digits = text.substr(mantissa_end + 1);
    bool exponent_negative = false;
    if (!digits.empty() && (digits.front() == '-' || digits.front() == '+')) {
      exponent_negative = digits.front() == '-';
      digits.remove_prefix(1);
    }
    if (digits.empty() || !std::all_of(digits.begin(), digits.end(), IsDigit))
      return std::nullopt;
    // Beyond this every value is either zero or outside int64.
    constexpr int64_t kLargestExponent = 1 << 20;
    for (const char c : digits)
      exponent = std::min(kLargestExponent, exponent * 10 + (c - '0'));
    if (exponent_negative) exponent = -exponent;
  }

  const std::size_t point = std::min(mantissa.find('.'), mantissa.size());
  const absl::string_view whole = mantissa.substr(0, point);
  const absl::string_view fraction = point < mantissa.size()
                                         ? mantissa.substr(point + 1)
                                         : absl::string_view();
  if (whole.empty() && fraction.empty()) return std::nullopt;
  if (!std::all_of(whole.begin(), whole.end(), IsDigit) ||
      !std::all_of(fraction.begin(), fraction.end(), IsDigit)) {
    return std::nullopt;
  }

  // Digit i counts 10^(whole.size() - 1 - i + exponent + scale).
  const uint64_t limit =
      static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) +
      (negative ? 1 : 0);
  const std::size_t digit_count = whole.size() + fraction.size();
  const int64_t units_power =
      static_cast<int64_t>(whole.size()) + exponent + scale;
  uint64_t value = 0;
  const auto push = [&](int digit) {
    if (value > (limit - digit) / 10) return false;
    value = value * 10 + digit;
    return true;
  };
  for (int64_t i = 0; i < std::max<int64_t>(units_power, 0); ++i) {
    const std::size_t at = static_cast<std::size_t>(i);
    if (at >= digit_count && value == 0) break;
    const int digit = at >= digit_count   ? 0
                      : at < whole.size() ? whole[at] - '0'
                                          : fraction[at - whole.size()] - '0';
    if (!push(digit)) return std::nullopt;
  }
  if (units_power >= 0 && static_cast<std::size_t>(units_power) < digit_count) {
    const std::size_t at = static_cast<std::size_t>(units_power);
    const char next =
        at < whole.size() ? whole[at] : fraction[at - whole.size()];
    if (next >= '5') {
      if (value >= limit) return std::nullopt;
      ++value;
    }
  }
  return negative ? static_cast<int64_t>(~value + 1)
                  : static_cast<int64_t>(value);
}

std::string MicrosecondsText(int64_t nanoseconds) {
  const bool negative = nanoseconds < 0;
  const uint64_t magnitude = negative ? ~static_cast<uint64_t>(nanoseconds) + 1
                                      : static_cast<uint64_t>(nanoseconds);
  std::string text = absl::StrCat(negative ? "-" : "", magnitude / 1000);
  if (const uint64_t rest = magnitude % 1000; rest != 0) {
    std::string digits = absl::StrCat(rest + 1000).substr(1);
    digits.erase(digits.find_last_not_of('0') + 1);
    absl::StrAppend(&text, ".", digits);
  }
  return text;
}

}  // namespace pipeweaver::profiler
