// Op tables: a table whose times can be predicted keeps its rows and columns,
// and predicting again changes nothing.

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "semu/base/check.h"
#include "semu/cost/ops/op_table.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace semu = pipeweaver::semu;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto predicted = semu::PredictOpTable(text);
  if (!predicted.ok()) {
    PW_CHECK(!predicted.status().message().empty());
    return 0;
  }
  const auto before = semu::ParseOpTable(text);
  const auto after = semu::ParseOpTable(*predicted);
  PW_CHECK(before.ok() && after.ok());
  PW_CHECK(after->columns == before->columns);
  PW_CHECK(after->rows.size() == before->rows.size());
  const auto again = semu::PredictOpTable(*predicted);
  PW_CHECK(again.ok() && *again == *predicted);
  return 0;
}
