// Tests of fitting and of the accuracy on models left out: on made-up
// measurements always, on real GPUs' where they are present.

#include "semu/cost/ops/op_accuracy.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "semu/cost/ops/op_fit.h"
#include "semu/cost/ops/op_rules.h"

namespace pipeweaver::semu {
namespace {

// Rows as a device with `truth` as its factors would measure them.
std::vector<OpRow> Measure(const DeviceFactors& truth, const std::string& model,
                           int64_t hidden) {
  std::vector<OpRow> rows;
  for (int64_t tokens = 64; tokens <= 4096; tokens += 192) {
    OpRow row;
    row.device = truth.name;
    row.model = model;
    row.tp = 1;
    row.tokens = tokens;
    const MatmulOp ops[] = {
        {tokens, 3 * hidden, hidden, MatmulRole::kGeneral},
        {tokens, hidden, hidden, MatmulRole::kAttentionOutput},
        {tokens, hidden, 4 * hidden, MatmulRole::kFfnDown}};
    for (const MatmulOp& op : ops) {
      row.cells.push_back(
          {"matmul", op,
           MatmulUs(truth, op.rows, op.columns, op.inner, op.role)});
    }
    const MemoryOp norm = {MemoryOpKind::kNorm, 4 * tokens * hidden};
    row.cells.push_back(
        {"norm", norm, MemoryOpUs(truth, norm.kind, norm.bytes)});
    rows.push_back(std::move(row));
  }
  return rows;
}

std::vector<const OpRow*> Pointers(const std::vector<OpRow>& rows) {
  std::vector<const OpRow*> pointers;
  pointers.reserve(rows.size());
  for (const OpRow& row : rows) pointers.push_back(&row);
  return pointers;
}

TEST(OpFitTest, FindsTheFactorsThatMadeTheMeasurements) {
  DeviceFactors truth = *FindDeviceFactors("a100");
  truth.matmul.peak_fraction *= 0.8;
  truth.matmul.ffn_down_rate = 0.9;
  truth.matmul.launch_us = 7;
  truth.memory_ops[static_cast<int>(MemoryOpKind::kNorm)].memory_fraction = 0.5;
  std::vector<OpRow> rows = Measure(truth, "m1", 2048);
  // A few runs were disturbed.
  for (std::size_t i = 0; i < rows.size(); i += 7)
    *rows[i].cells[0].measured_us *= 1.5;
  const DeviceFactors fitted =
      FitFactors(*FindDeviceFactors("a100"), Pointers(rows));
  const std::vector<OpRow> unseen = Measure(truth, "m2", 5120);
  const absl::StatusOr<ModelAccuracy> after =
      MeasureAccuracy(fitted, Pointers(unseen), 1024);
  ASSERT_TRUE(after.ok());
  EXPECT_LT(after->layer.mean, 0.05);
  EXPECT_LT(after->ops.at("norm").mean, 0.01);
  const absl::StatusOr<ModelAccuracy> before =
      MeasureAccuracy(*FindDeviceFactors("a100"), Pointers(unseen), 1024);
  EXPECT_GT(before->layer.mean, 0.1);
  EXPECT_EQ(fitted.collectives.size(), truth.collectives.size())
      << "not measured: kept";
}

TEST(OpFitTest, SourceHoldsEveryFactor) {
  const std::string source = FactorsSource(*FindDeviceFactors("h100"));
  EXPECT_THAT(source, ::testing::HasSubstr(".peak_fraction = 0.8006"));
  EXPECT_THAT(source,
              ::testing::HasSubstr(
                  "{CollectiveOpKind::kAllReduce, 4, 4, 26.41, 0, 4.194}"));
}

}  // namespace
}  // namespace pipeweaver::semu
