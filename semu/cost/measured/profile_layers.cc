// A profile's layer points as the measured cost model takes them.

#include "semu/cost/measured/profile_layers.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
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

// A job's layers by module and kind; nothing where a module has unlike layers
// of the kind. Views into the job.
using LayerIndex =
    absl::flat_hash_map<std::pair<absl::string_view, absl::string_view>,
                        std::optional<LayerSpec>>;

LayerIndex IndexLayers(const Job& job) {
  LayerIndex index;
  for (const Module& module : job.modules) {
    for (const LayerGroup& group : module.layers) {
      const auto [it, inserted] = index.try_emplace(
          {module.name, KindName(group.layer.kind)}, group.layer);
      if (!inserted && it->second != group.layer) it->second.reset();
    }
  }
  return index;
}

// The key's figures; those that are not given as of equal items.
Shape ShapeOf(const v1::LayerKey& key) {
  Shape shape;
  shape.tokens = key.tokens();
  shape.items = std::max<int64_t>(1, key.items());
  const int64_t longest = (shape.tokens + shape.items - 1) / shape.items;
  shape.max_tokens = key.max_tokens() > 0 ? key.max_tokens() : longest;
  shape.sum_squares =
      key.sum_squares() > 0 ? key.sum_squares() : shape.tokens * longest;
  shape.condition_tokens = key.condition_tokens();
  shape.condition_products = key.condition_products();
  return shape;
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
  const LayerIndex index = IndexLayers(job);
  std::vector<MeasuredLayer> layers;
  for (const v1::MeasuredPoint& point : profile.points()) {
    if (point.key().kind() != v1::POINT_KIND_LAYER) continue;
    const v1::LayerKey& key = point.key().layer();
    const auto layer = index.find({key.module(), key.layer()});
    const std::optional<MeasuredPass> pass = PassOf(key.pass());
    const int tensor_parallel = job.parallelism.tensor_parallel;
    const int context_parallel = job.parallelism.context_parallel;
    if (layer == index.end() || !layer->second || !pass || key.tokens() <= 0 ||
        point.median_ns() <= 0 ||
        !GivenAs(key.tensor_parallel(), tensor_parallel) ||
        !GivenAs(key.context_parallel(), context_parallel)) {
      continue;
    }
    MeasuredLayer measured;
    measured.layer = *layer->second;
    measured.tensor_parallel = tensor_parallel;
    measured.context_parallel = context_parallel;
    measured.pass = *pass;
    measured.shape = ShapeOf(key);
    measured.ns = point.median_ns();
    measured.count = std::min(point.count(), kMaxCount);
    layers.push_back(measured);
  }
  return layers;
}

}  // namespace pipeweaver::semu
