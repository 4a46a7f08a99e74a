// The picture has a lane a rank and a box a span, and is well-formed XML.

#include "semu/trace/svg_timeline.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

int Count(const std::string& text, const std::string& part) {
  int count = 0;
  for (size_t at = text.find(part); at != std::string::npos;
       at = text.find(part, at + part.size())) {
    ++count;
  }
  return count;
}

// Tags nest, attributes are quoted, no stray '<' or '&'. Enough of XML for what
// the writer emits.
bool WellFormed(const std::string& xml) {
  std::vector<std::string> open;
  for (size_t i = 0; i < xml.size(); ++i) {
    if (xml[i] == '&') {
      const size_t end = xml.find(';', i);
      if (end == std::string::npos || end - i > 6) return false;
    }
    if (xml[i] != '<') continue;
    const size_t end = xml.find('>', i);
    if (end == std::string::npos) return false;
    const std::string tag = xml.substr(i + 1, end - i - 1);
    if (tag.find('<') != std::string::npos || Count(tag, "\"") % 2 != 0) {
      return false;
    }
    if (tag[0] == '/') {
      if (open.empty() || open.back() != tag.substr(1)) return false;
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(tag.substr(0, tag.find(' ')));
    }
    i = end;
  }
  return open.empty();
}

Timeline Small() {
  Timeline timeline;
  timeline.title = "a <step> & more";
  timeline.subtitle = "4 ms";
  timeline.ranks = 2;
  timeline.modules = {"vision", "never used"};
  timeline.spans = {{0, 0, 2'000'000, 'F', 0, 12345, "chunk \"0\""},
                    {1, 2'000'000, 4'000'000, 'B', 0, 7, ""},
                    {1, 4'000'000, 4'000'001, 'W', 0, 8, ""},
                    {1, 4'000'001, 4'000'001, 'F', 0, 9, ""}};
  timeline.memory = {{{0, 10}, {2'000'000, 0}}, {{2'000'000, 5}}};
  timeline.memory_limit_bytes = {10, 10};
  return timeline;
}

TEST(SvgTimelineTest, DrawsLanesSpansAndLabels) {
  const std::string svg = SvgTimeline(Small(), {});
  EXPECT_TRUE(WellFormed(svg)) << svg;
  EXPECT_THAT(svg, HasSubstr("a &lt;step&gt; &amp; more"));
  EXPECT_THAT(svg, HasSubstr(">rank 0</text>"));
  EXPECT_THAT(svg, HasSubstr(">rank 1</text>"));
  EXPECT_THAT(svg, HasSubstr("50.0 % busy"));
  EXPECT_THAT(svg, HasSubstr(">12345</text>"));
  // Too narrow for a label; of no length: no box.
  EXPECT_THAT(svg, Not(HasSubstr(">8</text>")));
  EXPECT_EQ(Count(svg, "<title>"), 3);
  EXPECT_THAT(svg, Not(HasSubstr(">never used</text>")));
  EXPECT_EQ(svg, SvgTimeline(Small(), {}));
}

TEST(SvgTimelineTest, EmptyTimelines) {
  Timeline timeline;
  EXPECT_TRUE(WellFormed(SvgTimeline(timeline, {})));
  timeline.ranks = 3;
  EXPECT_TRUE(WellFormed(SvgTimeline(timeline, {.width = 1})));
}

}  // namespace
}  // namespace pipeweaver::semu
