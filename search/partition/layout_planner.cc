// Pure functions of job and costs.

#include "search/partition/layout_planner.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "search/partition/layer_partition.h"
#include "semu/base/check.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Job;
using semu::Modality;
using semu::Shape;

constexpr double kEfficient = 0.95;
constexpr int64_t kMostItemsTried = 64;

int64_t UsualItemTokens(const Job& job, int module) {
  const semu::Module& m = job.modules[module];
  const semu::TokenGrid& grid = m.token_grid;
  const auto grid_tokens = [&grid](int64_t pixels, int64_t frames) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    return ceil_div(pixels, grid.pixels_per_token_height) *
           ceil_div(pixels, grid.pixels_per_token_width) *
           ceil_div(frames, grid.frames_per_token);
  };
  int64_t tokens = 1024;
  switch (m.modality) {
    case Modality::kText:
      break;
    case Modality::kImage:
      if (grid.pixels_per_token_height > 0) tokens = grid_tokens(728, 1);
      break;
    case Modality::kVideo:
      if (grid.pixels_per_token_height > 0) tokens = grid_tokens(768, 32);
      break;
    case Modality::kAudio:
      tokens = 200;
      break;
    case Modality::kInherited: {
      const semu::ModuleEdge& edge =
          job.edges[semu::InheritedEdge(job, module)];
      tokens = UsualItemTokens(job, edge.producer) / edge.tokens_merged;
      break;
    }
  }
  return std::clamp<int64_t>(tokens, 1, job.max_microbatch_tokens[module]);
}

int64_t TotalNs(const std::vector<int64_t>& times) {
  return std::accumulate(times.begin(), times.end(), int64_t{0});
}

}  // namespace

Shape UsualShape(const Job& job, int module, int64_t tokens) {
  const int64_t item = std::min(tokens, UsualItemTokens(job, module));
  Shape shape;
  shape.items = tokens / item;
  const int64_t rest = tokens - shape.items * item;
  shape.tokens = tokens;
  shape.sum_squares = shape.items * item * item + rest * rest;
  shape.max_tokens = item;
  if (rest > 0) ++shape.items;
  if (semu::IsConditioned(job.modules[module])) {
    // A prompt of 256 tokens an item.
    shape.condition_tokens = 256 * shape.items;
    shape.condition_products = 256 * shape.tokens;
  }
  return shape;
}

std::vector<int64_t> LayerTimesNs(const Job& job, int module,
                                  const Shape& shape,
                                  const semu::CostModel& costs) {
  const semu::ModuleGradients gradients = semu::RequiredGradients(job);
  semu::LayerQuery query;
  query.shape = shape;
  query.weight_grad = gradients.weight[module];
  query.input_grad = gradients.Backward(module);
  std::vector<int64_t> times;
  for (const semu::LayerGroup& group : job.modules[module].layers) {
    query.layer = group.layer;
    const semu::StrategyCost cost =
        costs.Cost(semu::PlatformOf(job), query)[semu::MemoryStrategy::kKeep];
    times.insert(
        times.end(), group.count,
        cost.forward_ns + cost.fused_backward_ns.value_or(cost.input_grad_ns +
                                                          cost.weight_grad_ns));
  }
  return times;
}

int64_t EfficientTokens(const Job& job, int module,
                        const semu::CostModel& costs) {
  const int64_t item = UsualItemTokens(job, module);
  int64_t most = job.max_microbatch_tokens[module];
  if (!job.executor.shape_buckets.empty()) {
    most = std::min(most, job.executor.shape_buckets.back());
  }
  const int64_t items = std::clamp<int64_t>(most / item, 1, kMostItemsTried);
  std::vector<double> ns_a_token;
  for (int64_t k = 1; k <= items; ++k) {
    const Shape shape = UsualShape(job, module, k * item);
    ns_a_token.push_back(
        static_cast<double>(TotalNs(LayerTimesNs(job, module, shape, costs))) /
        static_cast<double>(shape.tokens));
  }
  const double least = *std::min_element(ns_a_token.begin(), ns_a_token.end());
  int64_t k = 0;
  while (ns_a_token[k] * kEfficient > least) ++k;
  return (k + 1) * item;
}

LayoutShape PaperLayoutShape(const Job& job, const semu::CostModel& costs) {
  const int ranks = job.parallelism.pipeline_parallel;
  LayoutShape shape;
  std::vector<int64_t> total_ns;
  int64_t least_ns = std::numeric_limits<int64_t>::max();
  for (size_t m = 0; m < job.modules.size(); ++m) {
    LayoutShape::ModuleShape& module = shape.modules.emplace_back();
    module.sub_microbatch_tokens =
        EfficientTokens(job, static_cast<int>(m), costs);
    total_ns.push_back(TotalNs(LayerTimesNs(
        job, static_cast<int>(m),
        UsualShape(job, static_cast<int>(m), module.sub_microbatch_tokens),
        costs)));
    if (job.modules[m].NumLayers() >= ranks) {
      least_ns = std::min(least_ns, total_ns.back());
    }
  }
  for (size_t m = 0; m < job.modules.size(); ++m) {
    const int64_t most = std::min<int64_t>(job.executor.max_segments,
                                           job.modules[m].NumLayers() / ranks);
    const int64_t ratio = least_ns > 0 ? total_ns[m] / least_ns : 1;
    shape.modules[m].segments =
        static_cast<int>(std::max<int64_t>(1, std::min(most, ratio)));
    shape.modules[m].descending.assign(shape.modules[m].segments, false);
  }
  return shape;
}

semu::Layout PlaceLayers(const Job& job, const LayoutShape& shape,
                         const semu::CostModel& costs) {
  PW_CHECK(shape.modules.size() == job.modules.size());
  const int ranks = job.parallelism.pipeline_parallel;
  semu::Layout layout;
  for (size_t m = 0; m < job.modules.size(); ++m) {
    const LayoutShape::ModuleShape& module = shape.modules[m];
    semu::ModuleLayout& out = layout.modules.emplace_back();
    out.sub_microbatch_tokens = module.sub_microbatch_tokens;
    const std::vector<int64_t> times = LayerTimesNs(
        job, static_cast<int>(m),
        UsualShape(job, static_cast<int>(m), module.sub_microbatch_tokens),
        costs);
    const int layers = static_cast<int>(times.size());
    const int width = std::min(ranks, layers);
    const bool fed = std::any_of(job.edges.begin(), job.edges.end(),
                                 [m](const semu::ModuleEdge& edge) {
                                   return edge.consumer == static_cast<int>(m);
                                 });
    const int first_rank = fed ? ranks - width : 0;
    const int segments = width < ranks ? 1 : module.segments;
    const std::vector<int> lengths = PartitionLayers(times, segments * width);
    int next_layer = 0;
    for (int s = 0; s < segments; ++s) {
      semu::PipelineSegment& segment = out.segments.emplace_back();
      for (int c = 0; c < width; ++c) {
        const int length = lengths[s * width + c];
        const int rank =
            module.descending[s] ? first_rank + width - 1 - c : first_rank + c;
        segment.chunks.push_back({rank, next_layer, length});
        next_layer += length;
      }
    }
  }
  return layout;
}

semu::Layout PlanLayout(const Job& job, const semu::CostModel& costs) {
  return PlaceLayers(job, PaperLayoutShape(job, costs), costs);
}

}  // namespace pipeweaver::search
