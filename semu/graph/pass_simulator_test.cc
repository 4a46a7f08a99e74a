// Hand-made graphs whose times and peaks can be read off.

#include "semu/graph/pass_simulator.h"

#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

void AddOp(Stream stream, OpTensors tensors, LayerGraph* graph) {
  Op op;
  op.stream = stream;
  graph->ops.push_back(op);
  graph->op_tensors.push_back(std::move(tensors));
}

TEST(PassSimulatorTest, WaitsForWritersAndStreams) {
  LayerGraph graph;
  graph.tensor_bytes = {1, 1, 1, 1};
  AddOp(Stream::kContextParallel, {{0}, {1}}, &graph);
  AddOp(Stream::kCompute, {{0}, {2}}, &graph);
  AddOp(Stream::kCompute, {{1, 2}, {3}}, &graph);
  const std::vector<int64_t> op_ns = {70, 50, 10};
  const PassFigures figures = SimulatePass(graph, {{0, 1, 2}, {0}, {3}}, op_ns);
  EXPECT_EQ(figures.latency_ns, 80);  // the ring, then the last operation
  EXPECT_EQ(PassLatency(graph, {{0, 1, 2}, {0}, {3}}).Ns(op_ns), 80);
  EXPECT_EQ(figures.busy_ns[static_cast<int>(Stream::kCompute)], 60);
  EXPECT_EQ(figures.busy_ns[static_cast<int>(Stream::kContextParallel)], 70);
  EXPECT_EQ(figures.busy_ns[static_cast<int>(Stream::kTensorParallel)], 0);
}

TEST(PassSimulatorTest, CollectivesHoldTheComputeStream) {
  LayerGraph graph;
  graph.tensor_bytes = {1, 1, 1};
  AddOp(Stream::kCompute, {{}, {0}}, &graph);
  AddOp(Stream::kTensorParallel, {{}, {1}}, &graph);
  AddOp(Stream::kCompute, {{}, {2}}, &graph);
  const std::vector<int64_t> op_ns = {5, 7, 11};
  EXPECT_EQ(SimulatePass(graph, {{0, 1, 2}, {}, {}}, op_ns).latency_ns, 23);
}

TEST(PassSimulatorTest, TensorsLiveFromFirstWriterToLastUser) {
  LayerGraph graph;
  graph.tensor_bytes = {100, 10, 1000, 20};
  AddOp(Stream::kCompute, {{0}, {1}}, &graph);
  AddOp(Stream::kCompute, {{1}, {2}}, &graph);
  AddOp(Stream::kCompute, {{2}, {3}}, &graph);
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
  AddOp(Stream::kContextParallel, {{}, {0}}, &graph);
  AddOp(Stream::kCompute, {{}, {1}}, &graph);
  const std::vector<int64_t> op_ns = {10, 10};
  EXPECT_EQ(SimulatePass(graph, {{0, 1}, {}, {}}, op_ns).peak_bytes, 24);
}

TEST(PassSimulatorTest, AnEmptyPassTakesNoTimeAndHoldsItsResults) {
  LayerGraph graph;
  graph.tensor_bytes = {8, 16};
  const PassFigures figures = SimulatePass(graph, {{}, {0, 1}, {1}}, {});
  EXPECT_EQ(figures.latency_ns, 0);
  EXPECT_EQ(PassLatency(graph, {{}, {0, 1}, {1}}).Ns({}), 0);
  EXPECT_EQ(figures.kept_bytes, 16);
}

// Whatever the streams and tensors.
TEST(PassSimulatorTest, TheLatencyAloneIsTheSame) {
  std::mt19937 random(1);
  for (int round = 0; round < 1000; ++round) {
    const int num_tensors = 1 + static_cast<int>(random() % 8);
    const auto draw = [&random](int end) {
      return static_cast<int>(random() % end);
    };
    LayerGraph graph;
    graph.tensor_bytes.assign(num_tensors, 1);
    Pass pass;
    std::vector<int64_t> op_ns;
    for (int op = draw(12); op >= 0; --op) {
      pass.ops.push_back(static_cast<int>(graph.ops.size()));
      AddOp(static_cast<Stream>(draw(kNumStreams)),
            {{draw(num_tensors), draw(num_tensors)}, {draw(num_tensors)}},
            &graph);
      op_ns.push_back(draw(100));
    }
    EXPECT_EQ(PassLatency(graph, pass).Ns(op_ns),
              SimulatePass(graph, pass, op_ns).latency_ns);
  }
}

}  // namespace
}  // namespace pipeweaver::semu
