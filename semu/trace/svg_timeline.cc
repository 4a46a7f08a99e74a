#include "semu/trace/svg_timeline.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace pipeweaver::semu {
namespace {

// One hue a module; they tell apart also for the colour-blind (after Paul Tol).
constexpr std::array<uint32_t, 8> kHues = {0x2f6db3, 0xe08a1e, 0x2e9e6b,
                                           0x8c5bb5, 0xc8475b, 0x1f9aa8,
                                           0x8d6e4f, 0x6b7482};

constexpr double kLeft = 74;
constexpr double kRight = 96;
constexpr double kTop = 92;
constexpr double kLane = 34;
constexpr double kMemory = 13;  // height of a lane's memory line
constexpr double kGap = 9;      // between lanes

std::string Escaped(absl::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        // XML has no place for control characters.
        escaped += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return escaped;
}

// `hue` mixed with `white` parts of white, 0 .. 1.
std::string Tint(uint32_t hue, double white) {
  const auto channel = [&](int shift) {
    const double value = static_cast<double>((hue >> shift) & 0xff);
    return static_cast<int>(std::lround(value + (255 - value) * white));
  };
  return absl::StrFormat("#%02x%02x%02x", channel(16), channel(8), channel(0));
}

// Forwards in a middle shade, backwards in the full one, weight gradients pale.
double WhiteOf(char kind) {
  switch (kind) {
    case 'F':
      return 0.42;
    case 'W':
      return 0.72;
    default:
      return 0;
  }
}

constexpr char kKinds[] = {'F', 'B', 'I', 'W'};

const char* KindName(char kind) {
  switch (kind) {
    case 'F':
      return "forward";
    case 'B':
      return "backward";
    case 'I':
      return "input grad";
    default:
      return "weight grad";
  }
}

struct TimeUnit {
  double ns = 1;
  const char* name = "ns";
};

TimeUnit UnitFor(int64_t length_ns) {
  if (length_ns >= 10'000'000'000) return {1e9, "s"};
  if (length_ns >= 10'000'000) return {1e6, "ms"};
  if (length_ns >= 10'000) return {1e3, "µs"};
  return {1, "ns"};
}

std::string Time(int64_t ns) {
  const TimeUnit unit = UnitFor(ns);
  const double value = static_cast<double>(ns) / unit.ns;
  return absl::StrFormat("%.*f %s",
                         unit.ns == 1  ? 0
                         : value < 100 ? 2
                                       : 1,
                         value, unit.name);
}

// The distance of ticks: 1, 2 or 5 times a power of ten, about ten of them.
double TickStep(double length) {
  const double rough = length / 10;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= rough) return factor * power;
  }
  return 10 * power;
}

class Picture {
 public:
  Picture(const Timeline& timeline, const SvgOptions& options)
      : timeline_(timeline),
        width_(options.width > 0 ? std::max(options.width, 400)
                                 : WidthFor(timeline)),
        lane_step_(kLane + kGap + (timeline.memory.empty() ? 0 : kMemory)),
        busy_ns_(timeline.ranks, 0) {
    for (const TimelineSpan& span : timeline.spans) {
      end_ns_ = std::max(end_ns_, span.end_ns);
      busy_ns_[span.rank] += static_cast<double>(span.end_ns - span.start_ns);
    }
    bottom_ = kTop + timeline.ranks * lane_step_;
    height_ = bottom_ + 46;
    scale_ = (width_ - kLeft - kRight) /
             static_cast<double>(std::max<int64_t>(1, end_ns_));
  }

  // Some fifteen pixels for a stage of average length.
  static int WidthFor(const Timeline& timeline) {
    const int64_t stages = static_cast<int64_t>(timeline.spans.size()) /
                           std::max(1, timeline.ranks);
    return static_cast<int>(std::clamp<int64_t>(
        static_cast<int64_t>(kLeft + kRight) + 15 * stages, 1200, 3200));
  }

  std::string Draw() {
    Open();
    Heading();
    Legend();
    Axis();
    Lanes();
    Memory();
    Spans();
    svg_ += "</svg>\n";
    return std::move(svg_);
  }

 private:
  double X(int64_t time_ns) const {
    return kLeft + static_cast<double>(time_ns) * scale_;
  }
  double Y(int rank) const { return kTop + rank * lane_step_; }

  void Text(double x, double y, absl::string_view style,
            absl::string_view text) {
    absl::StrAppendFormat(&svg_, "<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">", x,
                          y, style);
    absl::StrAppend(&svg_, Escaped(text), "</text>\n");
  }

  void Open() {
    absl::StrAppendFormat(
        &svg_,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" "
        "height=\"%.0f\" viewBox=\"0 0 %d %.0f\">\n<style>\n"
        "text{font-family:Inter,'Helvetica Neue',Helvetica,Arial,sans-serif;"
        "fill:#1d2430}\n"
        ".t{font-size:19px;font-weight:600}\n"
        ".s{font-size:13px;fill:#5a6473}\n"
        ".k{font-size:12px;fill:#3c4552}\n"
        ".r{font-size:13px;font-weight:600;text-anchor:end}\n"
        ".u{font-size:12px;fill:#5a6473}\n"
        ".a{font-size:11px;fill:#5a6473;text-anchor:middle}\n"
        ".n{font-size:10.5px;text-anchor:middle}\n"
        ".q{font-size:8.5px;text-anchor:middle}\n"
        ".l{fill:#ffffff}\n",
        width_, height_, width_, height_);
    for (size_t m = 0; m < timeline_.modules.size(); ++m) {
      for (const char kind : kKinds) {
        absl::StrAppendFormat(&svg_, ".m%d%c{fill:%s}\n", static_cast<int>(m),
                              kind, Colour(static_cast<int>(m), kind));
      }
    }
    svg_ +=
        "</style>\n<defs><pattern id=\"idle\" width=\"7\" height=\"7\" "
        "patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">"
        "<rect width=\"7\" height=\"7\" fill=\"#f1f3f6\"/>"
        "<rect width=\"2\" height=\"7\" fill=\"#dfe3ea\"/></pattern></defs>\n"
        "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n";
  }

  static std::string Colour(int module, char kind) {
    return Tint(kHues[static_cast<size_t>(module) % kHues.size()],
                WhiteOf(kind));
  }

  void Heading() {
    Text(24, 33, "t", timeline_.title);
    const double busy = BusyShare();
    std::string line = absl::StrFormat("%s, %.1f %% of the ranks' time idle",
                                       Time(end_ns_), 100 * (1 - busy));
    if (!timeline_.subtitle.empty()) {
      line = absl::StrCat(timeline_.subtitle, "  ·  ", line);
    }
    Text(24, 54, "s", line);
  }

  double BusyShare() const {
    double busy = 0;
    for (const double ns : busy_ns_) busy += ns;
    const double all = static_cast<double>(end_ns_) * timeline_.ranks;
    return all > 0 ? busy / all : 0;
  }

  // Modules and their shades, of the kinds that occur.
  void Legend() {
    double x = 24;
    const double y = 66;
    std::vector<std::array<bool, 128>> used(timeline_.modules.size());
    for (auto& kinds : used) kinds.fill(false);
    for (const TimelineSpan& span : timeline_.spans) {
      used[span.module][static_cast<size_t>(span.kind) & 127] = true;
    }
    for (size_t m = 0; m < timeline_.modules.size(); ++m) {
      bool any = false;
      for (const char kind : kKinds) {
        any = any || used[m][static_cast<size_t>(kind)];
      }
      if (!any) continue;
      Text(x, y + 10.5, "k", timeline_.modules[m]);
      x += 8 + 6.6 * static_cast<double>(timeline_.modules[m].size());
      for (const char kind : kKinds) {
        if (!used[m][static_cast<size_t>(kind)]) continue;
        const double box =
            12 + 6.0 * static_cast<double>(std::string(KindName(kind)).size());
        absl::StrAppendFormat(
            &svg_,
            "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"15\" "
            "rx=\"3\" class=\"m%d%c\"/>\n",
            x, y, box, static_cast<int>(m), kind);
        Text(x + box / 2, y + 11, LabelClass(kind), KindName(kind));
        x += box + 3;
      }
      x += 20;
    }
    absl::StrAppendFormat(&svg_,
                          "<rect x=\"%.1f\" y=\"%.1f\" width=\"40\" "
                          "height=\"15\" rx=\"3\" fill=\"url(#idle)\"/>\n",
                          x, y);
    Text(x + 20, y + 11, "n", "idle");
    x += 60;
    if (!timeline_.memory.empty()) {
      absl::StrAppendFormat(
          &svg_,
          "<path d=\"M%.1f %.1fl10 -5 8 2 10 -6\" fill=\"none\" "
          "stroke=\"#5a6473\" stroke-width=\"1.4\"/>\n",
          x, y + 13);
      Text(x + 34, y + 11, "k", "memory (share of the limit)");
    }
  }

  static bool IsDark(char kind) { return kind == 'B' || kind == 'I'; }
  static const char* LabelClass(char kind) {
    return IsDark(kind) ? "n l" : "n";
  }

  void Axis() {
    const TimeUnit unit = UnitFor(end_ns_);
    const double length =
        static_cast<double>(std::max<int64_t>(1, end_ns_)) / unit.ns;
    const double step = TickStep(length);
    const int decimals =
        step >= 1 ? 0 : static_cast<int>(std::ceil(-std::log10(step) - 1e-9));
    for (int i = 0; i * step <= length * 1.000001; ++i) {
      const double x = kLeft + i * step * unit.ns * scale_;
      absl::StrAppendFormat(&svg_,
                            "<path d=\"M%.1f %.1fV%.1f\" stroke=\"#d4d9e1\" "
                            "stroke-width=\"1\"/>\n",
                            x, kTop - 3, bottom_ + 4);
      Text(x, bottom_ + 19, "a", absl::StrFormat("%.*f", decimals, i * step));
    }
    Text(kLeft + (width_ - kLeft - kRight) / 2, bottom_ + 37, "a",
         absl::StrCat("time, ", unit.name));
  }

  void Lanes() {
    for (int r = 0; r < timeline_.ranks; ++r) {
      absl::StrAppendFormat(
          &svg_,
          "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" "
          "fill=\"url(#idle)\"/>\n",
          kLeft, Y(r), width_ - kLeft - kRight, kLane);
      Text(kLeft - 10, Y(r) + kLane / 2 + 4.5, "r", absl::StrCat("rank ", r));
      if (end_ns_ == 0) continue;
      Text(width_ - kRight + 10, Y(r) + kLane / 2 + 4.5, "u",
           absl::StrFormat("%.1f %% busy",
                           100.0 * busy_ns_[r] / static_cast<double>(end_ns_)));
    }
  }

  // A step line below each lane, full height at the limit, or at the highest
  // peak where no limits are given.
  void Memory() {
    int64_t highest = 1;
    for (const auto& samples : timeline_.memory) {
      for (const MemorySample& sample : samples) {
        highest = std::max(highest, sample.bytes);
      }
    }
    for (size_t r = 0; r < timeline_.memory.size(); ++r) {
      const double full = static_cast<double>(
          timeline_.memory_limit_bytes.empty()
              ? highest
              : std::max<int64_t>(1, timeline_.memory_limit_bytes[r]));
      const double base = Y(static_cast<int>(r)) + kLane + kMemory;
      absl::StrAppendFormat(&svg_, "<path d=\"M%.1f %.1f", kLeft, base);
      double last_x = kLeft;
      double level = base;
      double extreme = base;  // the highest level since the last point drawn
      for (const MemorySample& sample : timeline_.memory[r]) {
        const double x = X(sample.time_ns);
        // Points closer than a third of a pixel are one, at their peak.
        if (x - last_x > 0.33) {
          if (extreme < level) absl::StrAppendFormat(&svg_, "V%.1f", extreme);
          absl::StrAppendFormat(&svg_, "V%.1fH%.1f", level, x);
          last_x = x;
          extreme = base;
        }
        level =
            base - (kMemory - 1.5) *
                       std::min(1.0, static_cast<double>(sample.bytes) / full);
        extreme = std::min(extreme, level);
      }
      absl::StrAppendFormat(
          &svg_,
          "V%.1fH%.1fV%.1fZ\" fill=\"#aab4c3\" fill-opacity=\"0.35\" "
          "stroke=\"#6b7686\" stroke-width=\"0.8\"/>\n",
          level, X(end_ns_), base);
    }
  }

  void Spans() {
    for (const TimelineSpan& span : timeline_.spans) {
      const double x = X(span.start_ns);
      const double full = X(span.end_ns) - x;
      if (full <= 0) continue;
      // A hair of background between neighbours, where there is room for it.
      const double width = full > 3 ? full - 0.7 : full;
      absl::StrAppendFormat(
          &svg_,
          "<rect x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"%.1f\" "
          "class=\"m%d%c\"><title>",
          x, Y(span.rank), width, kLane, span.module, span.kind);
      absl::StrAppend(&svg_,
                      Escaped(absl::StrCat(timeline_.modules[span.module], " ",
                                           KindName(span.kind), ", microbatch ",
                                           span.microbatch)),
                      span.detail.empty() ? "" : ", ", Escaped(span.detail),
                      ": ", Time(span.start_ns), " to ", Time(span.end_ns),
                      "</title></rect>\n");
      const std::string label = absl::StrCat(span.microbatch);
      const double digits = static_cast<double>(label.size());
      if (width >= 5 + 6.2 * digits) {
        Text(x + width / 2, Y(span.rank) + kLane / 2 + 3.8,
             LabelClass(span.kind), label);
      } else if (width >= 2 + 5 * digits) {
        Text(x + width / 2, Y(span.rank) + kLane / 2 + 3.1,
             IsDark(span.kind) ? "q l" : "q", label);
      }
    }
  }

  const Timeline& timeline_;
  const int width_;
  const double lane_step_;
  // [rank]; spans that overlap could pass int64.
  std::vector<double> busy_ns_;
  int64_t end_ns_ = 0;
  double bottom_ = 0;
  double height_ = 0;
  double scale_ = 0;  // pixels a nanosecond
  std::string svg_;
};

}  // namespace

std::string SvgTimeline(const Timeline& timeline, const SvgOptions& options) {
  return Picture(timeline, options).Draw();
}

}  // namespace pipeweaver::semu
