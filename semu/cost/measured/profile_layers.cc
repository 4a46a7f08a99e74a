// A profile's layer points as the measured cost model takes them.

#include "semu/cost/measured/profile_layers.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace pipeweaver::semu {
namespace {

// Weighs as much as any count need.
constexpr int64_t kMaxCount = 1'000'000;

absl::string_view KindName(LayerKind kind) {
  switch (kind) {
    case LayerKind::kTransformer:
      return "transformer";
    case LayerKind::kDit:
      return "dit";
    case LayerKind::kEmbedding:
      return "embedding";
    case LayerKind::kLmHead:
      return "lm_head";
    case LayerKind::kPatchEmbed:
      return "patch_embed";
    case LayerKind::kProjector:
      return "projector";
  }
  return "";
}

std::optional<LayerSpec> FindLayer(const Job& job, const v1::LayerKey& key) {
  for (const Module& module : job.modules) {
    if (module.name != key.module()) continue;
    for (const LayerGroup& group : module.layers) {
      if (KindName(group.layer.kind) == key.layer()) return group.layer;
    }
  }
  return std::nullopt;
}

std::optional<MeasuredPass> PassOf(v1::LayerPass pass) {
  switch (pass) {
    case v1::LAYER_PASS_FORWARD:
      return MeasuredPass::kForward;
    case v1::LAYER_PASS_BACKWARD:
      return MeasuredPass::kBackward;
    case v1::LAYER_PASS_INPUT_GRAD:
      return MeasuredPass::kInputGrad;
    case v1::LAYER_PASS_WEIGHT_GRAD:
      return MeasuredPass::kWeightGrad;
    default:
      return std::nullopt;
  }
}

// 0: not given.
bool GivenAs(int32_t value, int own) { return value == 0 || value == own; }

}  // namespace

std::vector<MeasuredLayer> MeasuredLayersOf(const v1::Profile& profile,
                                            const Job& job) {
  std::vector<MeasuredLayer> layers;
  for (const v1::MeasuredPoint& point : profile.points()) {
    if (point.key().kind() != v1::POINT_KIND_LAYER) continue;
    const v1::LayerKey& key = point.key().layer();
    const std::optional<LayerSpec> layer = FindLayer(job, key);
    const std::optional<MeasuredPass> pass = PassOf(key.pass());
    const int tensor_parallel = job.parallelism.tensor_parallel;
    const int context_parallel = job.parallelism.context_parallel;
    if (!layer || !pass || key.tokens() <= 0 || point.median_ns() <= 0 ||
        !GivenAs(key.tensor_parallel(), tensor_parallel) ||
        !GivenAs(key.context_parallel(), context_parallel)) {
      continue;
    }
    MeasuredLayer measured;
    measured.layer = *layer;
    measured.tensor_parallel = tensor_parallel;
    measured.context_parallel = context_parallel;
    measured.pass = *pass;
    measured.shape.items = key.items();
    measured.shape.tokens = key.tokens();
    measured.shape.sum_squares = key.sum_squares();
    measured.shape.max_tokens = key.max_tokens();
    measured.shape.condition_tokens = key.condition_tokens();
    measured.shape.condition_products = key.condition_products();
    measured.ns = point.median_ns();
    measured.count = std::min(point.count(), kMaxCount);
    layers.push_back(measured);
  }
  return layers;
}

}  // namespace pipeweaver::semu
