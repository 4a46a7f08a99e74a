// Pure functions of job and costs.

#include "search/partition/layout_planner.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "search/partition/batch_split.h"
#include "search/partition/layer_partition.h"
#include "search/partition/usual_batch.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Job;
using semu::Shape;

constexpr double kEfficient = 0.95;
constexpr int64_t kMostItemsTried = 64;
// Bounds of the work that evening out may take.
constexpr size_t kMostChunksEvened = 256;
constexpr int kMostMoves = 256;
constexpr double kWorthMoving = 0.99999;

int64_t TotalNs(const std::vector<int64_t>& times) {
  return std::accumulate(times.begin(), times.end(), int64_t{0});
}

// A module's chunks while layers move between them.
class PlacedModule {
 public:
  explicit PlacedModule(const std::vector<int64_t>& times)
      : before_(times.size() + 1, 0) {
    for (size_t l = 0; l < times.size(); ++l) {
      before_[l + 1] = before_[l] + times[l];
      longest_layer_ = std::max(longest_layer_, times[l]);
    }
  }

  size_t NumLayers() const { return before_.size() - 1; }
  int64_t longest_layer() const { return longest_layer_; }

  // Time of each chunk were its length as in `lengths`.
  std::vector<int64_t> ChunkTimes(const std::vector<int>& lengths) const {
    std::vector<int64_t> times;
    int next = 0;
    for (int length : lengths) {
      times.push_back(before_[next + length] - before_[next]);
      next += length;
    }
    return times;
  }

  std::vector<int> lengths;  // [chunk]
  std::vector<int> ranks;    // [chunk]

 private:
  std::vector<int64_t> before_;  // time of the layers before each
  int64_t longest_layer_ = 0;
};

// Work of the busiest rank, then how uneven the ranks are.
using Unevenness = std::pair<int64_t, double>;

Unevenness UnevennessOf(const std::vector<int64_t>& loads) {
  double squares = 0;
  for (int64_t load : loads) {
    squares += static_cast<double>(load) * static_cast<double>(load);
  }
  return {*std::max_element(loads.begin(), loads.end()), squares};
}

void EvenRanksOut(int ranks, std::vector<PlacedModule>* modules) {
  std::vector<int64_t> loads(ranks, 0);
  std::vector<int64_t> most_chunk;  // [module]: bound of a chunk's time
  size_t chunks = 0;
  for (const PlacedModule& module : *modules) {
    const std::vector<int64_t> times = module.ChunkTimes(module.lengths);
    for (size_t c = 0; c < times.size(); ++c) {
      loads[module.ranks[c]] += times[c];
    }
    most_chunk.push_back(*std::max_element(times.begin(), times.end()) +
                         module.longest_layer());
    chunks += times.size();
  }
  if (chunks > kMostChunksEvened) return;
  for (int moves = 0; moves < kMostMoves; ++moves) {
    const int busiest = static_cast<int>(
        std::max_element(loads.begin(), loads.end()) - loads.begin());
    Unevenness best = UnevennessOf(loads);
    std::vector<int64_t> best_loads;
    std::vector<int> best_lengths;
    PlacedModule* best_module = nullptr;
    for (size_t m = 0; m < modules->size(); ++m) {
      PlacedModule& module = (*modules)[m];
      const std::vector<int64_t> now = module.ChunkTimes(module.lengths);
      const int count = static_cast<int>(module.lengths.size());
      for (int from = 0; from < count; ++from) {
        if (module.ranks[from] != busiest || module.lengths[from] < 2) continue;
        for (int to = 0; to < count; ++to) {
          if (module.ranks[to] == busiest) continue;
          std::vector<int> lengths = module.lengths;
          --lengths[from];
          ++lengths[to];
          const std::vector<int64_t> times = module.ChunkTimes(lengths);
          if (*std::max_element(times.begin(), times.end()) > most_chunk[m]) {
            continue;
          }
          std::vector<int64_t> moved = loads;
          for (int c = 0; c < count; ++c) {
            moved[module.ranks[c]] += times[c] - now[c];
          }
          const Unevenness unevenness = UnevennessOf(moved);
          if (unevenness.first <= best.first &&
              unevenness.second < kWorthMoving * best.second) {
            best = unevenness;
            best_loads = std::move(moved);
            best_lengths = std::move(lengths);
            best_module = &module;
          }
        }
      }
    }
    if (best_module == nullptr) return;
    best_module->lengths = std::move(best_lengths);
    loads = std::move(best_loads);
  }
}

}  // namespace

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

absl::StatusOr<LayoutShape> PaperLayoutShape(const Job& job,
                                             const semu::CostModel& costs) {
  const int ranks = job.parallelism.pipeline_parallel;
  PW_ASSIGN_OR_RETURN(const LayerTimes mean,
                      MeanLayerTimes(job, UsualBatch(job, 4), costs));
  int64_t work_ns = 0;
  for (const std::vector<int64_t>& times : mean) work_ns += TotalNs(times);
  LayoutShape shape;
  std::vector<int64_t> total_ns;
  std::vector<int64_t> to_match_ns;  // of modules that count for T_min
  for (size_t m = 0; m < job.modules.size(); ++m) {
    LayoutShape::ModuleShape& module = shape.modules.emplace_back();
    module.sub_microbatch_tokens =
        EfficientTokens(job, static_cast<int>(m), costs);
    total_ns.push_back(TotalNs(LayerTimesNs(
        job, static_cast<int>(m),
        UsualShape(job, static_cast<int>(m), module.sub_microbatch_tokens),
        costs)));
    if (job.modules[m].NumLayers() >= ranks &&
        static_cast<double>(TotalNs(mean[m])) >=
            kLightModule * static_cast<double>(work_ns)) {
      to_match_ns.push_back(total_ns.back());
    }
  }
  const int64_t least_ns =
      to_match_ns.empty()
          ? 0
          : *std::min_element(to_match_ns.begin(), to_match_ns.end());
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

absl::StatusOr<LayerTimes> MeanLayerTimes(const Job& job,
                                          const semu::Batch& batch,
                                          const semu::CostModel& costs) {
  const int64_t microbatches = static_cast<int64_t>(batch.microbatches.size());
  LayerTimes means;
  double sum_ns = 0;
  for (size_t m = 0; m < job.modules.size(); ++m) {
    std::vector<int64_t>& mean = means.emplace_back();
    mean.assign(job.modules[m].NumLayers(), 0);
    for (size_t b = 0; b < batch.microbatches.size(); ++b) {
      SubMicrobatch whole;
      whole.module = static_cast<int>(m);
      whole.microbatch = static_cast<int>(b);
      whole.items.resize(batch.microbatches[b].item_tokens[m].size());
      if (whole.items.empty()) continue;
      std::iota(whole.items.begin(), whole.items.end(), 0);
      const std::vector<int64_t> times = LayerTimesNs(
          job, whole.module, ShapesOf(job, batch, {whole})[0], costs);
      // Divided one by one: the sum of many bounded times could pass int64.
      for (size_t l = 0; l < times.size(); ++l) {
        mean[l] += times[l] / microbatches;
      }
    }
    sum_ns += static_cast<double>(TotalNs(mean));
  }
  if (sum_ns > static_cast<double>(kMostWeightSum)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "all layers take ", sum_ns,
        " ns for a mean microbatch: must be at most ", kMostWeightSum,
        "; device or items are out of proportion"));
  }
  return means;
}

semu::Layout PlaceLayers(const Job& job, const LayoutShape& shape,
                         const LayerTimes& times) {
  PW_CHECK(shape.modules.size() == job.modules.size());
  PW_CHECK(times.size() == job.modules.size());
  const int ranks = job.parallelism.pipeline_parallel;
  std::vector<PlacedModule> placed;
  for (size_t m = 0; m < job.modules.size(); ++m) {
    const LayoutShape::ModuleShape& module = shape.modules[m];
    const int layers = static_cast<int>(times[m].size());
    const int width = std::min(ranks, layers);
    const bool fed = std::any_of(job.edges.begin(), job.edges.end(),
                                 [m](const semu::ModuleEdge& edge) {
                                   return edge.consumer == static_cast<int>(m);
                                 });
    const int first_rank = fed ? ranks - width : 0;
    const int segments = width < ranks ? 1 : module.segments;
    PlacedModule& out = placed.emplace_back(times[m]);
    // A module that the batch never runs is divided by count.
    const bool idle = std::all_of(times[m].begin(), times[m].end(),
                                  [](int64_t ns) { return ns == 0; });
    out.lengths = PartitionLayers(
        idle ? std::vector<int64_t>(layers, 1) : times[m], segments * width);
    for (int s = 0; s < segments; ++s) {
      for (int c = 0; c < width; ++c) {
        out.ranks.push_back(first_rank +
                            (module.descending[s] ? width - 1 - c : c));
      }
    }
  }
  EvenRanksOut(ranks, &placed);

  semu::Layout layout;
  for (size_t m = 0; m < placed.size(); ++m) {
    semu::ModuleLayout& out = layout.modules.emplace_back();
    out.sub_microbatch_tokens = shape.modules[m].sub_microbatch_tokens;
    const int chunks = static_cast<int>(placed[m].lengths.size());
    const int width = std::min(ranks, static_cast<int>(placed[m].NumLayers()));
    int next_layer = 0;
    for (int c = 0; c < chunks; ++c) {
      if (c % width == 0) out.segments.emplace_back();
      out.segments.back().chunks.push_back(
          {placed[m].ranks[c], next_layer, placed[m].lengths[c]});
      next_layer += placed[m].lengths[c];
    }
  }
  return layout;
}

absl::StatusOr<semu::Layout> PlanLayout(const Job& job,
                                        const semu::CostModel& costs) {
  PW_ASSIGN_OR_RETURN(const LayoutShape shape, PaperLayoutShape(job, costs));
  PW_ASSIGN_OR_RETURN(const LayerTimes times,
                      MeanLayerTimes(job, UsualBatch(job, 4), costs));
  return PlaceLayers(job, shape, times);
}

}  // namespace pipeweaver::search
