// Tests of fitting and of the accuracy on models left out: on made-up
// measurements always, on real GPUs' where they are present.

#include "semu/cost/ops/op_accuracy.h"

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "profiler/text_source.h"
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

class ReferenceOps : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* shared = std::getenv("PIPEWEAVER_SHARED");
    const std::filesystem::path folder =
        std::filesystem::path(shared != nullptr ? shared : "../shared") /
        "data" / "ops";
    std::error_code error;
    for (const auto& entry :
         std::filesystem::directory_iterator(folder, error)) {
      const std::string path = entry.path().string();
      if (!absl::EndsWith(path, ".csv.gz")) continue;
      const absl::StatusOr<std::string> text =
          profiler::ReadTextFile(path, 64 << 20);
      ASSERT_TRUE(text.ok()) << text.status();
      absl::StatusOr<OpTable> table = ParseOpTable(*text);
      ASSERT_TRUE(table.ok()) << path << ": " << table.status();
      tables_.push_back(*std::move(table));
    }
    if (tables_.empty()) GTEST_SKIP() << "skipped: " << folder << " missing";
    for (const OpTable& table : tables_) {
      for (const OpRow& row : table.rows) rows_.push_back(&row);
    }
  }

  std::vector<OpTable> tables_;
  std::vector<const OpRow*> rows_;
};

TEST_F(ReferenceOps, ModelsLeftOutAreWithinBounds) {
  const absl::StatusOr<std::vector<ModelAccuracy>> models =
      LeaveOneModelOut(rows_, 1024);
  ASSERT_TRUE(models.ok()) << models.status();
  EXPECT_GE(models->size(), 8u);
  for (const ModelAccuracy& model : *models) {
    SCOPED_TRACE(model.device + " " + model.name);
    EXPECT_LT(model.layer.mean, 0.05);
    EXPECT_LT(model.worst_matmul_mean, 0.10);
  }
}

TEST_F(ReferenceOps, NvlinkCollectivesAreWithinBounds) {
  int groups = 0;
  for (const char* name : {"a100", "h100"}) {
    for (const int workers : {2, 4, 8}) {
      std::vector<const OpRow*> group;
      for (const OpRow* row : rows_) {
        const auto* op = std::get_if<CollectiveOp>(&row->cells[0].op);
        if (row->device == name && op != nullptr && op->workers == workers &&
            op->devices_per_node == workers && op->bytes > 1'000'000 &&
            op->kind == CollectiveOpKind::kAllReduce) {
          group.push_back(row);
        }
      }
      const absl::StatusOr<ModelAccuracy> accuracy =
          MeasureAccuracy(*FindDeviceFactors(name), group, 0);
      ASSERT_TRUE(accuracy.ok()) << accuracy.status();
      if (accuracy->layer.count == 0) continue;
      ++groups;
      EXPECT_LT(accuracy->layer.mean, 0.10) << name << " " << workers;
    }
  }
  EXPECT_GE(groups, 6);
}

TEST_F(ReferenceOps, DefaultFactorsAreThoseFittedToEverything) {
  for (const char* name : {"a100", "h100"}) {
    std::vector<const OpRow*> models;
    for (const OpRow* row : rows_) {
      if (row->device == name && !row->model.empty()) models.push_back(row);
    }
    const DeviceFactors fitted = FitFactors(*FindDeviceFactors(name), models);
    const absl::StatusOr<ModelAccuracy> now =
        MeasureAccuracy(*FindDeviceFactors(name), models, 1024);
    const absl::StatusOr<ModelAccuracy> best =
        MeasureAccuracy(fitted, models, 1024);
    ASSERT_TRUE(now.ok() && best.ok());
    EXPECT_LT(now->layer.mean, best->layer.mean + 0.002) << name;
  }
}

}  // namespace
}  // namespace pipeweaver::semu
