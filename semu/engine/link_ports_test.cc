// Ports carry one transfer at a time each way; channels keep their order.

#include "semu/engine/link_ports.h"

#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;

// Runs to the end; (time, transfer) of each end.
std::vector<std::pair<int64_t, int>> RunOut(LinkPorts& ports, int64_t now_ns) {
  std::vector<std::pair<int64_t, int>> ends;
  std::vector<int> ended;
  while (true) {
    now_ns = ports.NextEventNs(now_ns);
    if (now_ns == kNever) return ends;
    ended.clear();
    ports.AdvanceTo(now_ns, &ended);
    for (int t : ended) ends.emplace_back(now_ns, t);
  }
}

TEST(LinkPortsTest, OneAtATimeOutOfARank) {
  const std::vector<StepTransfer> transfers = {{0, 1, 10, 3}, {0, 2, 10, 3}};
  LinkPorts ports(3, transfers);
  ports.Start(5, 1);
  ports.Start(5, 0);
  // The port is free again before the latency has passed.
  EXPECT_THAT(RunOut(ports, 5), ElementsAre(Pair(18, 0), Pair(28, 1)));
}

TEST(LinkPortsTest, OneAtATimeIntoARank) {
  const std::vector<StepTransfer> transfers = {{0, 2, 10, 0}, {1, 2, 4, 0}};
  LinkPorts ports(3, transfers);
  ports.Start(0, 0);
  ports.Start(0, 1);
  EXPECT_THAT(RunOut(ports, 0), ElementsAre(Pair(10, 0), Pair(14, 1)));
}

TEST(LinkPortsTest, BothWaysAtOnceBetweenDifferentRanks) {
  const std::vector<StepTransfer> transfers = {{0, 1, 10, 0}, {2, 0, 10, 0}};
  LinkPorts ports(3, transfers);
  ports.Start(0, 0);
  ports.Start(0, 1);
  EXPECT_THAT(RunOut(ports, 0), ElementsAre(Pair(10, 0), Pair(10, 1)));
}

TEST(LinkPortsTest, AChannelKeepsItsOrderBothWays) {
  const std::vector<StepTransfer> transfers = {{0, 1, 10, 2}, {1, 0, 10, 2}};
  LinkPorts ports(2, transfers);
  ports.Start(0, 1);
  EXPECT_EQ(ports.NextEventNs(0), kNever);
  ports.Start(7, 0);
  EXPECT_THAT(RunOut(ports, 7), ElementsAre(Pair(19, 0), Pair(31, 1)));
}

TEST(LinkPortsTest, WhatCannotBeginLetsOthersPass) {
  const std::vector<StepTransfer> transfers = {
      {0, 1, 10, 0}, {0, 2, 10, 0}, {3, 2, 1, 0}};
  LinkPorts ports(4, transfers);
  ports.Start(0, 0);
  EXPECT_EQ(ports.NextEventNs(0), 10);
  ports.Start(1, 1);
  EXPECT_EQ(ports.NextEventNs(1), 10);
  ports.Start(2, 2);
  EXPECT_THAT(RunOut(ports, 2),
              ElementsAre(Pair(3, 2), Pair(10, 0), Pair(20, 1)));
}

TEST(LinkPortsTest, NoTimeAtAll) {
  const std::vector<StepTransfer> transfers = {{0, 1, 0, 0}, {0, 1, 0, 0}};
  LinkPorts ports(2, transfers);
  ports.Start(4, 0);
  ports.Start(4, 1);
  EXPECT_THAT(RunOut(ports, 4), ElementsAre(Pair(4, 0), Pair(4, 1)));
}

}  // namespace
}  // namespace pipeweaver::semu
