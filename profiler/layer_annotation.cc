// The form in which trainers name a layer's pass in annotations.

#include "profiler/layer_annotation.h"

#include <cstdint>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace pipeweaver::profiler {
namespace {

constexpr absl::string_view kPrefix = "pw:";

struct PassName {
  absl::string_view name;
  v1::LayerPass pass;
};

constexpr PassName kPasses[] = {
    {"forward", v1::LAYER_PASS_FORWARD},
    {"backward", v1::LAYER_PASS_BACKWARD},
    {"input_grad", v1::LAYER_PASS_INPUT_GRAD},
    {"weight_grad", v1::LAYER_PASS_WEIGHT_GRAD},
};

template <typename Integer>
bool ReadFigure(absl::string_view text, Integer* value) {
  return absl::SimpleAtoi(text, value) && *value >= 0;
}

bool SetField(absl::string_view field, absl::string_view text,
              v1::LayerKey* key) {
  int64_t large = 0;
  int32_t small = 0;
  if (field == "module") {
    key->set_module(std::string(text));
  } else if (field == "layer") {
    key->set_layer(std::string(text));
  } else if (field == "pass") {
    for (const PassName& pass : kPasses) {
      if (text == pass.name) key->set_pass(pass.pass);
    }
    return key->pass() != v1::LAYER_PASS_UNSPECIFIED;
  } else if (field == "items" && ReadFigure(text, &large)) {
    key->set_items(large);
  } else if (field == "tokens" && ReadFigure(text, &large)) {
    key->set_tokens(large);
  } else if (field == "sum_squares" && ReadFigure(text, &large)) {
    key->set_sum_squares(large);
  } else if (field == "max_tokens" && ReadFigure(text, &large)) {
    key->set_max_tokens(large);
  } else if (field == "condition_tokens" && ReadFigure(text, &large)) {
    key->set_condition_tokens(large);
  } else if (field == "condition_products" && ReadFigure(text, &large)) {
    key->set_condition_products(large);
  } else if (field == "tp" && ReadFigure(text, &small)) {
    key->set_tensor_parallel(small);
  } else if (field == "cp" && ReadFigure(text, &small)) {
    key->set_context_parallel(small);
  } else {
    return false;
  }
  return true;
}

}  // namespace

std::optional<v1::LayerKey> ParseLayerAnnotation(absl::string_view name) {
  if (!absl::ConsumePrefix(&name, kPrefix)) return std::nullopt;
  v1::LayerKey key;
  std::set<absl::string_view> seen;
  for (const absl::string_view part : absl::StrSplit(name, ',')) {
    const std::pair<absl::string_view, absl::string_view> field =
        absl::StrSplit(part, absl::MaxSplits('=', 1));
    if (!seen.insert(field.first).second ||
        !SetField(field.first, field.second, &key)) {
      return std::nullopt;
    }
  }
  if (key.module().empty() || key.layer().empty() ||
      key.pass() == v1::LAYER_PASS_UNSPECIFIED) {
    return std::nullopt;
  }
  return key;
}

std::string LayerAnnotation(const v1::LayerKey& key) {
  std::string text =
      absl::StrCat(kPrefix, "module=", key.module(), ",layer=", key.layer());
  for (const PassName& pass : kPasses) {
    if (pass.pass == key.pass()) absl::StrAppend(&text, ",pass=", pass.name);
  }
  const auto append = [&text](absl::string_view field, int64_t value) {
    if (value != 0) absl::StrAppend(&text, ",", field, "=", value);
  };
  append("items", key.items());
  append("tokens", key.tokens());
  append("sum_squares", key.sum_squares());
  append("max_tokens", key.max_tokens());
  append("condition_tokens", key.condition_tokens());
  append("condition_products", key.condition_products());
  append("tp", key.tensor_parallel());
  append("cp", key.context_parallel());
  return text;
}

}  // namespace pipeweaver::profiler
