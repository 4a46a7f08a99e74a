// Tests of reading op tables and writing predicted ones.

#include "semu/cost/ops/op_table.h"

#include <string>
#include <variant>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "semu/cost/ops/op_rules.h"

namespace pipeweaver::semu {
namespace {

using ::testing::HasSubstr;

constexpr char kHeader[] =
    "gpu,model,hidden,ffn,heads,kv_heads,vocab,gated,tp,tokens,emb_us,input_"
    "layernorm_us,"
    "attn_pre_proj_us,attn_rope_us,attn_post_proj_us,post_attention_layernorm_"
    "us,mlp_up_proj_us,"
    "mlp_act_us,mlp_down_proj_us,add_us\n";

TEST(OpTableTest, ReadsShapesPerGpu) {
  const absl::StatusOr<OpTable> table = ParseOpTable(absl::StrCat(
      kHeader,
      "h100,m,8192,28672,64,8,32768,True,4,1024,1,2,3,4,5,6,7,8,9,10\n"));
  ASSERT_TRUE(table.ok()) << table.status();
  ASSERT_EQ(table->rows.size(), 1u);
  const OpRow& row = table->rows[0];
  EXPECT_EQ(row.device, "h100");
  EXPECT_EQ(row.model, "m");
  EXPECT_EQ(row.tp, 4);
  EXPECT_EQ(row.tokens, 1024);
  ASSERT_EQ(row.cells.size(), 10u);
  const auto matmul = [&row](int i) {
    return std::get<MatmulOp>(row.cells[i].op);
  };
  EXPECT_EQ(matmul(2).columns, (64 + 2 * 8) * 128 / 4);
  EXPECT_EQ(matmul(2).inner, 8192);
  EXPECT_EQ(matmul(4).columns, 8192);
  EXPECT_EQ(matmul(4).inner, 2048);
  EXPECT_EQ(matmul(6).columns, 2 * 28672 / 4);
  EXPECT_EQ(matmul(8).inner, 28672 / 4);
  EXPECT_EQ(matmul(8).role, MatmulRole::kFfnDown);
  EXPECT_EQ(matmul(8).rows, 1024);
  EXPECT_EQ(row.cells[8].measured_us, 9);
  EXPECT_EQ(std::get<MemoryOp>(row.cells[1].op).bytes, 2 * 2 * 1024 * 8192);
  EXPECT_EQ(std::get<MemoryOp>(row.cells[7].op).bytes,
            2 * 3 * 1024 * 28672 / 4);
}

TEST(OpTableTest, PredictionKeepsAllButTheTimes) {
  const std::string row = "h100,phi-2,2560,10240,32,32,51200,False,1,4096";
  const absl::StatusOr<std::string> measured =
      PredictOpTable(absl::StrCat(kHeader, row, ",1,2,3,4,5,,7,8,9,10\r\n"));
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_THAT(*measured,
              ::testing::StartsWith(absl::StrCat(kHeader, row, ",")));
  const absl::StatusOr<OpTable> table = ParseOpTable(*measured);
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(table->rows[0].cells[5].measured_us, std::nullopt)
      << "no second norm, none predicted";
  EXPECT_NEAR(*table->rows[0].cells[8].measured_us,
              MatmulUs(*FindDeviceFactors("h100"), 4096, 2560, 10240,
                       MatmulRole::kFfnDown),
              1e-3);

  for (const OpCell& cell : table->rows[0].cells) {
    if (cell.absent) continue;
    EXPECT_GT(cell.measured_us.value_or(0), 0) << cell.name;
  }
}

TEST(OpTableTest, PredictionDoesNotLookAtTheTimes) {
  for (const char* model : {"phi-2", "Llama-2-7b-hf"}) {
    const std::string row =
        absl::StrCat("h100,", model, ",2560,10240,32,32,51200,False,1,4096");
    const bool parallel = model[0] == 'p';
    const absl::StatusOr<std::string> empty =
        PredictOpTable(absl::StrCat(kHeader, row, ",,,,,,,,,,\n"));
    ASSERT_TRUE(empty.ok()) << empty.status();
    EXPECT_EQ(*PredictOpTable(absl::StrCat(kHeader, row, ",1,2,3,4,5,",
                                           parallel ? "" : "6", ",7,8,9,10\n")),
              *empty);
    const absl::StatusOr<OpTable> table = ParseOpTable(*empty);
    ASSERT_TRUE(table.ok()) << table.status();
    const OpRow& predicted = table->rows[0];
    EXPECT_EQ(predicted.cells[5].measured_us.has_value(), !parallel);
    EXPECT_EQ(std::get<MemoryOp>(predicted.cells[9].op).bytes,
              2 * (parallel ? 6 : 3) * 4096 * 2560);
  }
  // A column says so of a model that is not known.
  const absl::StatusOr<OpTable> table = ParseOpTable(
      "gpu,model,hidden,ffn,heads,kv_heads,gated,tp,tokens,parallel_block,"
      "add_us\n"
      "h100,m,8,8,4,4,False,1,16,True,\n"
      "h100,phi-2,8,8,4,4,False,1,16,False,\n");
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(std::get<MemoryOp>(table->rows[0].cells[0].op).bytes, 2 * 6 * 128);
  EXPECT_EQ(std::get<MemoryOp>(table->rows[1].cells[0].op).bytes, 2 * 3 * 128);
}

TEST(OpTableTest, ReadsCollectives) {
  const absl::StatusOr<std::string> csv = PredictOpTable(
      "system,collective,workers,devices_per_node,bytes,median_us,min_over_"
      "ranks_us\n"
      "h100_dgx,all_reduce,4,4,16000000,,\n"
      "h100_dgx,send_recv,2,2,16000000,1,1\n");
  ASSERT_TRUE(csv.ok()) << csv.status();
  EXPECT_THAT(*csv,
              HasSubstr("h100_dgx,all_reduce,4,4,16000000,93.514,93.514\n"));
}

TEST(OpTableTest, ErrorsNameLineColumnAndRule) {
  const auto message = [](const std::string& text) {
    const absl::Status status = PredictOpTable(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    return std::string(status.message());
  };
  const auto with_row = [&message](const std::string& row) {
    return message(absl::StrCat(kHeader, row, ",1,1,1,1,1,1,1,1,1,1\n"));
  };
  EXPECT_EQ(message(""), "the table has no header");
  EXPECT_EQ(message("gpu,model\n"), "line 1: column hidden is missing");
  EXPECT_EQ(message("gpu,gpu\n"), "line 1: column gpu appears twice");
  EXPECT_EQ(message(absl::StrCat(kHeader, "h100,m\n")),
            "line 2 has 2 cells, the header 20");
  EXPECT_EQ(with_row("h100,m,0,8,4,4,9,True,1,8"),
            "line 2: hidden '0' must be an integer from 1 to 1000000");
  EXPECT_EQ(with_row("h100,m,8,8,3,3,9,True,1,8"),
            "line 2: heads '3' must divide hidden");
  EXPECT_EQ(with_row("h100,m,8,8,4,4,9,True,3,8"),
            "line 2: tp '3' must divide hidden");
  EXPECT_EQ(with_row("h100,m,8,8,4,4,9,maybe,1,8"),
            "line 2: gated 'maybe' must be True or False");
  EXPECT_THAT(
      with_row("mi300,m,8,8,4,4,9,True,1,8"),
      HasSubstr(
          "line 2: gpu 'mi300' has no fitted factors; known: a100, h100"));
  EXPECT_EQ(with_row("h100,m,8,8,4,8,9,True,1,8"),
            "line 2: kv_heads '8' must be at most heads");
  EXPECT_THAT(message(absl::StrCat(
                  kHeader, "h100,m,8,8,4,4,9,True,1,8,x,1,1,1,1,1,1,1,1,1\n")),
              HasSubstr("emb_us 'x' must be empty or a time"));
  EXPECT_THAT(
      message("gpu,model,hidden,ffn,heads,kv_heads,gated,tp,tokens,gelu_us\n"
              "h100,m,8,8,4,4,True,1,8,1\n"),
      HasSubstr("gelu_us is no known op"));
  EXPECT_THAT(
      message("system,collective,workers,devices_per_node,bytes,median_us\n"
              "h100_dgx,gossip,4,4,16,1\n"),
      HasSubstr("collective 'gossip' must be"));
  const absl::Status absent =
      PredictOpTable(
          "system,collective,workers,devices_per_node,bytes,median_us\n\n"
          "h100_dgx,all_reduce,16,8,16,\n")
          .status();
  EXPECT_EQ(absent.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(absent.message(),
              HasSubstr("line 3: device h100 has no factors for transfers "
                        "across nodes"));
}

}  // namespace
}  // namespace pipeweaver::semu
