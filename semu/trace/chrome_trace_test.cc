// The trace is JSON that says what the timeline says.

#include "semu/trace/chrome_trace.h"

#include <string>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace pipeweaver::semu {
namespace {

Timeline Small() {
  Timeline timeline;
  timeline.title = "a \"step\"\n";
  timeline.ranks = 2;
  timeline.modules = {"vision", "text\\"};
  timeline.spans = {{0, 0, 1'500, 'F', 0, 3, "chunk 0"},
                    {1, 2'001, 4'000, 'B', 1, 3, ""}};
  timeline.transfers = {{0, 1, true, 77}};
  timeline.memory = {{{0, 10}, {1'500, 0}}, {}};
  return timeline;
}

TEST(ChromeTraceTest, SaysWhatTheTimelineSays) {
  const auto json =
      nlohmann::json::parse(ChromeTraceJson(Small()), nullptr, false);
  ASSERT_FALSE(json.is_discarded());
  EXPECT_EQ(json["otherData"]["title"], "a \"step\"\n");
  int spans = 0, starts = 0, finishes = 0, samples = 0, names = 0;
  for (const auto& event : json["traceEvents"]) {
    const std::string phase = event["ph"];
    if (phase == "X") {
      ++spans;
      if (event["tid"] == 0) {
        EXPECT_EQ(event["name"], "F vision 3");
        EXPECT_DOUBLE_EQ(event["dur"], 1.5);
        EXPECT_EQ(event["args"]["detail"], "chunk 0");
      } else {
        EXPECT_EQ(event["name"], "B text\\ 3");
        EXPECT_DOUBLE_EQ(event["ts"], 2.001);
      }
    } else if (phase == "s") {
      ++starts;
      EXPECT_DOUBLE_EQ(event["ts"], 1.499);
      EXPECT_EQ(event["args"]["bytes"], 77);
    } else if (phase == "f") {
      ++finishes;
      EXPECT_EQ(event["tid"], 1);
    } else if (phase == "C") {
      ++samples;
    } else {
      ++names;
    }
  }
  EXPECT_EQ(spans, 2);
  EXPECT_EQ(starts, 1);
  EXPECT_EQ(finishes, 1);
  EXPECT_EQ(samples, 2);
  EXPECT_EQ(names, 1 + 2 * 2);
}

}  // namespace
}  // namespace pipeweaver::semu
