#include "semu/trace/chrome_trace.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace pipeweaver::semu {
namespace {

std::string Quoted(absl::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      absl::StrAppendFormat(&quoted, "\\u%04x", static_cast<int>(c));
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

// The format counts in microseconds.
std::string Micros(int64_t ns) {
  return absl::StrFormat("%d.%03d", ns / 1000, ns % 1000);
}

const char* KindName(char kind) {
  switch (kind) {
    case 'F':
      return "forward";
    case 'B':
      return "backward";
    case 'I':
      return "input gradient";
    default:
      return "weight gradient";
  }
}

}  // namespace

std::string ChromeTraceJson(const Timeline& timeline) {
  std::string json = absl::StrCat(
      "{\"displayTimeUnit\":\"ms\",\"otherData\":{\"title\":",
      Quoted(timeline.title), ",\"subtitle\":", Quoted(timeline.subtitle),
      "},\"traceEvents\":[\n"
      "{\"ph\":\"M\",\"pid\":0,\"name\":\"process_name\",\"args\":{\"name\":",
      Quoted(timeline.title), "}}");
  for (int r = 0; r < timeline.ranks; ++r) {
    absl::StrAppend(
        &json, ",\n{\"ph\":\"M\",\"pid\":0,\"tid\":", r,
        ",\"name\":\"thread_name\",\"args\":{\"name\":\"rank ", r,
        "\"}},\n{\"ph\":\"M\",\"pid\":0,\"tid\":", r,
        ",\"name\":\"thread_sort_index\",\"args\":{\"sort_index\":", r, "}}");
  }
  for (const TimelineSpan& span : timeline.spans) {
    absl::StrAppend(
        &json, ",\n{\"ph\":\"X\",\"pid\":0,\"tid\":", span.rank,
        ",\"ts\":", Micros(span.start_ns),
        ",\"dur\":", Micros(span.end_ns - span.start_ns), ",\"name\":",
        Quoted(absl::StrCat(std::string(1, span.kind), " ",
                            timeline.modules[span.module], " ",
                            span.microbatch)),
        ",\"cat\":\"", KindName(span.kind),
        "\",\"args\":{\"module\":", Quoted(timeline.modules[span.module]),
        ",\"microbatch\":", span.microbatch,
        ",\"detail\":", Quoted(span.detail), "}}");
  }
  for (size_t i = 0; i < timeline.transfers.size(); ++i) {
    const TimelineTransfer& transfer = timeline.transfers[i];
    const TimelineSpan& from = timeline.spans[transfer.from_span];
    const TimelineSpan& to = timeline.spans[transfer.to_span];
    const char* name = transfer.gradient ? "gradient" : "activation";
    // A flow hangs on the slice that runs at its time: just before the end of
    // the producer, and at the start of the consumer.
    absl::StrAppend(
        &json, ",\n{\"ph\":\"s\",\"pid\":0,\"tid\":", from.rank,
        ",\"ts\":", Micros(std::max(from.start_ns, from.end_ns - 1)),
        ",\"id\":", i, ",\"name\":\"", name,
        "\",\"cat\":\"transfer\",\"args\":{\"bytes\":", transfer.bytes,
        "}},\n{\"ph\":\"f\",\"bp\":\"e\",\"pid\":0,\"tid\":", to.rank,
        ",\"ts\":", Micros(to.start_ns), ",\"id\":", i, ",\"name\":\"", name,
        "\",\"cat\":\"transfer\"}");
  }
  for (size_t r = 0; r < timeline.memory.size(); ++r) {
    for (const MemorySample& sample : timeline.memory[r]) {
      absl::StrAppend(&json, ",\n{\"ph\":\"C\",\"pid\":0,\"ts\":",
                      Micros(sample.time_ns), ",\"name\":\"memory of rank ", r,
                      "\",\"args\":{\"bytes\":", sample.bytes, "}}");
    }
  }
  return json + "\n]}\n";
}

}  // namespace pipeweaver::semu
