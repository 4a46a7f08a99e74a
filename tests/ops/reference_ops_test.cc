// The op cost rules against real GPUs' measurements, where those are present.

#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "semu/base/text_source.h"
#include "semu/cost/ops/op_accuracy.h"
#include "semu/cost/ops/op_fit.h"

namespace pipeweaver::semu {
namespace {

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
      const absl::StatusOr<std::string> text = ReadTextFile(path, 64 << 20);
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

TEST_F(ReferenceOps, HiddenSizesAndDegreesLeftOutAreWithinBounds) {
  const auto hidden_size = [](const OpRow& row) {
    for (const OpCell& cell : row.cells) {
      const auto* matmul = std::get_if<MatmulOp>(&cell.op);
      if (matmul != nullptr && cell.name == "attn_pre_proj")
        return matmul->inner;
    }
    return int64_t{0};
  };
  const auto error = [&](const char* name, const auto& held_out) {
    std::vector<const OpRow*> fitted;
    std::vector<const OpRow*> held;
    for (const OpRow* row : rows_) {
      if (row->device != name || row->model.empty()) continue;
      (held_out(*row) ? held : fitted).push_back(row);
    }
    return MeasureAccuracy(FitFactors(*FindDeviceFactors(name), fitted), held,
                           1024)
        ->layer.mean;
  };
  for (const char* name : {"a100", "h100"}) {
    EXPECT_LT(
        error(name, [&](const OpRow& row) { return hidden_size(row) > 4096; }),
        0.05);
    EXPECT_LT(
        error(name, [&](const OpRow& row) { return hidden_size(row) < 8192; }),
        0.05);
    EXPECT_LT(error(name, [](const OpRow& row) { return row.tp == 8; }), 0.05);
  }
}

TEST_F(ReferenceOps, NvlinkWorkerCountsLeftOutAreWithinBounds) {
  for (const char* name : {"a100", "h100"}) {
    for (const int workers : {4, 8}) {
      std::vector<const OpRow*> fitted;
      std::vector<const OpRow*> held;
      for (const OpRow* row : rows_) {
        const auto* op = std::get_if<CollectiveOp>(&row->cells[0].op);
        if (row->device != name || op == nullptr || op->bytes < 1'000'000 ||
            op->kind != CollectiveOpKind::kAllReduce ||
            op->devices_per_node != op->workers) {
          continue;
        }
        (op->workers == workers ? held : fitted).push_back(row);
      }
      const absl::StatusOr<ModelAccuracy> accuracy = MeasureAccuracy(
          FitFactors(*FindDeviceFactors(name), fitted), held, 0);
      ASSERT_TRUE(accuracy.ok()) << accuracy.status();
      EXPECT_LT(accuracy->layer.mean, 0.12) << name << " " << workers;
    }
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
