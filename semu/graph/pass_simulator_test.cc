// Hand-made graphs whose times and peaks can be read off.

#include "semu/graph/pass_simulator.h"

#include <cstdint>
#include <vector>

#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

Op MakeOp(Stream stream, absl::InlinedVector<int, 4> reads,
          absl::InlinedVector<int, 2> writes) {
  Op op;
  op.stream = stream;
  op.reads = std::move(reads);
  op.writes = std::move(writes);
  return op;
}

TEST(PassSimulatorTest, WaitsForWritersAndStreams) {
  LayerGraph graph;
  graph.tensor_bytes = {1, 1, 1, 1};
  graph.ops = {MakeOp(Stream::kContextParallel, {0}, {1}),
               MakeOp(Stream::kCompute, {0}, {2}),
               MakeOp(Stream::kCompute, {1, 2}, {3})};
  const std::vector<int64_t> op_ns = {70, 50, 10};
  const PassFigures figures = SimulatePass(graph, {{0, 1, 2}, {0}, {3}}, op_ns);
  EXPECT_EQ(figures.latency_ns, 80);  // the ring, then the last operation
  EXPECT_EQ(PassLatencyNs(graph, {{0, 1, 2}, {0}, {3}}, op_ns), 80);
  EXPECT_EQ(figures.busy_ns[static_cast<int>(Stream::kCompute)], 60);
  EXPECT_EQ(figures.busy_ns[static_cast<int>(Stream::kContextParallel)], 70);
  EXPECT_EQ(figures.busy_ns[static_cast<int>(Stream::kTensorParallel)], 0);
}

TEST(PassSimulatorTest, CollectivesHoldTheComputeStream) {
  LayerGraph graph;
  graph.tensor_bytes = {1, 1, 1};
  graph.ops = {MakeOp(Stream::kCompute, {}, {0}),
               MakeOp(Stream::kTensorParallel, {}, {1}),
               MakeOp(Stream::kCompute, {}, {2})};
  const std::vector<int64_t> op_ns = {5, 7, 11};
  EXPECT_EQ(SimulatePass(graph, {{0, 1, 2}, {}, {}}, op_ns).latency_ns, 23);
}

TEST(PassSimulatorTest, TensorsLiveFromFirstWriterToLastUser) {
  LayerGraph graph;
  graph.tensor_bytes = {100, 10, 1000, 20};
  graph.ops = {MakeOp(Stream::kCompute, {0}, {1}),
               MakeOp(Stream::kCompute, {1}, {2}),
               MakeOp(Stream::kCompute, {2}, {3})};
  const std::vector<int64_t> op_ns = {1, 1, 1};
  // 0 goes after the first operation, 1 after the second, 2 after the third.
  const PassFigures freed = SimulatePass(graph, {{0, 1, 2}, {0}, {3}}, op_ns);
  EXPECT_EQ(freed.peak_bytes, 1020);
  EXPECT_EQ(freed.kept_bytes, 20);
  const PassFigures kept =
      SimulatePass(graph, {{0, 1, 2}, {0}, {0, 1, 3}}, op_ns);
  EXPECT_EQ(kept.peak_bytes, 1130);
  EXPECT_EQ(kept.kept_bytes, 130);
}

TEST(PassSimulatorTest, OverlappingStreamsAddUpTheirTensors) {
  LayerGraph graph;
  graph.tensor_bytes = {8, 16};
  graph.ops = {MakeOp(Stream::kContextParallel, {}, {0}),
               MakeOp(Stream::kCompute, {}, {1})};
  const std::vector<int64_t> op_ns = {10, 10};
  EXPECT_EQ(SimulatePass(graph, {{0, 1}, {}, {}}, op_ns).peak_bytes, 24);
}

TEST(PassSimulatorTest, AnEmptyPassTakesNoTimeAndHoldsItsResults) {
  LayerGraph graph;
  graph.tensor_bytes = {8, 16};
  const PassFigures figures = SimulatePass(graph, {{}, {0, 1}, {1}}, {});
  EXPECT_EQ(figures.latency_ns, 0);
  EXPECT_EQ(figures.kept_bytes, 16);
}

}  // namespace
}  // namespace pipeweaver::semu
