// Two ways to divide items, the better one taken.

#include "search/partition/batch_split.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <queue>
#include <tuple>
#include <utility>

#include "search/strategy/worker_pool.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/model/layer_size.h"
#include "semu/model/module_graph.h"
#include "semu/model/shape_buckets.h"

namespace pipeweaver::search {
namespace {

using semu::Batch;
using semu::Job;
using semu::Microbatch;

double LargestSum(absl::Span<const double> weights,
                  const std::vector<std::vector<int>>& groups) {
  double largest = 0;
  for (const std::vector<int>& group : groups) {
    double sum = 0;
    for (int i : group) sum += weights[i];
    largest = std::max(largest, sum);
  }
  return largest;
}

std::vector<std::vector<int>> LongestFirst(absl::Span<const double> weights,
                                           int groups) {
  std::vector<int> order(weights.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&weights](int a, int b) {
    return weights[a] > weights[b];
  });
  // Load, items, group: items of no weight go to the emptiest, so that no group
  // stays empty.
  using Load = std::tuple<double, int, int>;
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
  for (int g = 0; g < groups; ++g) loads.emplace(0, 0, g);
  std::vector<std::vector<int>> result(groups);
  for (int i : order) {
    const auto [load, items, group] = loads.top();
    loads.pop();
    result[group].push_back(i);
    loads.emplace(load + weights[i], items + 1, group);
  }
  for (std::vector<int>& group : result) std::sort(group.begin(), group.end());
  std::sort(result.begin(), result.end());
  return result;
}

// Neighbours, no group above `limit` unless too few groups are left.
std::vector<std::vector<int>> Runs(absl::Span<const double> weights, int groups,
                                   double limit) {
  const int count = static_cast<int>(weights.size());
  std::vector<std::vector<int>> result;
  result.reserve(groups);
  result.emplace_back();
  double sum = 0;
  for (int i = 0; i < count; ++i) {
    const int groups_left = groups - static_cast<int>(result.size());
    const bool full = sum + weights[i] > limit && groups_left > 0;
    const bool needed = count - i <= groups_left;
    if (!result.back().empty() && (full || needed)) {
      result.emplace_back();
      sum = 0;
    }
    result.back().push_back(i);
    sum += weights[i];
  }
  return result;
}

// No division into groups has a smaller largest sum.
double LeastLargestSum(absl::Span<const double> weights, int groups) {
  return std::max(std::accumulate(weights.begin(), weights.end(), 0.0) / groups,
                  *std::max_element(weights.begin(), weights.end()));
}

std::vector<std::vector<int>> BestRuns(absl::Span<const double> weights,
                                       int groups) {
  double high = std::accumulate(weights.begin(), weights.end(), 0.0);
  double low = LeastLargestSum(weights, groups);
  const auto enough = [&weights, groups](double limit) {
    int used = 1;
    double sum = 0;
    for (double w : weights) {
      if (sum + w > limit) {
        if (++used > groups) return false;
        sum = 0;
      }
      sum += w;
    }
    return true;
  };
  if (enough(low)) high = low;
  // Halving the range 20 times leaves a millionth of it.
  for (int step = 0; step < 20 && low < high; ++step) {
    const double middle = low + (high - low) / 2;
    (enough(middle) ? high : low) = middle;
  }
  return Runs(weights, groups, high);
}

// What of a layer group the weights of items depend on.
struct GroupWeight {
  double count = 0;
  double parameters = 0;  // that each token is multiplied by
  double width = 0;       // of attention; 0: none
  double pairs = 1;       // share of the pairs of tokens that attend
  bool condition = false;
};

std::vector<GroupWeight> GroupWeights(const semu::Module& module) {
  std::vector<GroupWeight> groups;
  groups.reserve(module.layers.size());
  for (const semu::LayerGroup& group : module.layers) {
    const semu::LayerSpec& layer = group.layer;
    GroupWeight& weight = groups.emplace_back();
    weight.count = group.count;
    if (layer.kind != semu::LayerKind::kEmbedding) {
      weight.parameters = static_cast<double>(semu::ParameterCount(layer));
    }
    if (layer.heads > 0) weight.width = static_cast<double>(layer.hidden_size);
    weight.pairs = layer.causal ? 0.5 : 1.0;
    weight.condition = layer.kind == semu::LayerKind::kDit;
  }
  return groups;
}

// Arithmetic of an item in a module, in units of no meaning.
double ItemWeight(const std::vector<GroupWeight>& groups, int64_t tokens,
                  int64_t condition_tokens) {
  const double n = static_cast<double>(tokens);
  const double m = static_cast<double>(condition_tokens);
  double weight = 0;
  for (const GroupWeight& group : groups) {
    double one = group.parameters * n + 2 * group.width * n * n * group.pairs;
    if (group.condition) one += 2 * group.width * n * m;
    weight += one * group.count;
  }
  return weight;
}

// [item]: tokens that an item of `module` takes as its condition.
std::vector<int64_t> ConditionTokens(const Job& job, int module,
                                     const Microbatch& microbatch) {
  std::vector<int64_t> tokens(microbatch.item_tokens[module].size(), 0);
  if (!semu::IsConditioned(job.modules[module])) return tokens;
  for (size_t e = 0; e < job.edges.size(); ++e) {
    const semu::ModuleEdge& edge = job.edges[e];
    if (edge.consumer != module) continue;
    for (const semu::ItemUse& use : microbatch.uses[e]) {
      tokens[use.consumer_item] += CrossingTokens(
          edge, microbatch.item_tokens[edge.producer][use.producer_item]);
    }
  }
  return tokens;
}

}  // namespace

int64_t CrossingTokens(const semu::ModuleEdge& edge, int64_t producer_tokens) {
  return (producer_tokens + edge.tokens_merged - 1) / edge.tokens_merged;
}

std::vector<std::vector<int>> SplitItems(absl::Span<const double> weights,
                                         int groups) {
  PW_CHECK(groups >= 1 && groups <= static_cast<int>(weights.size()));
  if (groups == 1) {
    std::vector<int> all(weights.size());
    std::iota(all.begin(), all.end(), 0);
    return {all};
  }
  constexpr double kMostMore = 1.05;
  std::vector<std::vector<int>> runs = BestRuns(weights, groups);
  const bool complete = static_cast<int>(runs.size()) == groups;
  const double largest = LargestSum(weights, runs);
  if (complete && largest <= kMostMore * LeastLargestSum(weights, groups)) {
    return runs;
  }
  std::vector<std::vector<int>> longest = LongestFirst(weights, groups);
  const bool runs_will_do =
      complete && largest <= kMostMore * LargestSum(weights, longest);
  return runs_will_do ? runs : longest;
}

namespace {

// Appends the sub-microbatches of microbatch `b`. `order`: of the modules;
// `group_weights`: [module].
absl::Status SplitMicrobatch(
    const Job& job, const semu::Layout& layout, const std::vector<int>& order,
    absl::Span<const std::vector<GroupWeight>> group_weights,
    const Microbatch& microbatch, int b, std::vector<SubMicrobatch>* result) {
  PW_RETURN_IF_ERROR(semu::CheckShapeBuckets(job, microbatch, b));
  const int64_t largest_bucket = job.executor.shape_buckets.empty()
                                     ? 0
                                     : job.executor.shape_buckets.back();
  std::vector<std::vector<std::vector<int>>> split(job.modules.size());
  for (int m : order) {
    const std::vector<int64_t>& tokens = microbatch.item_tokens[m];
    if (tokens.empty()) continue;
    const int inherited = semu::InheritedEdge(job, m);
    if (inherited >= 0) {
      split[m] = split[job.edges[inherited].producer];
      continue;
    }
    const std::vector<int64_t> condition = ConditionTokens(job, m, microbatch);
    std::vector<double> weights(tokens.size());
    int64_t sum = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      weights[i] = ItemWeight(group_weights[m], tokens[i], condition[i]);
      sum += tokens[i];
    }
    const int64_t target = layout.modules[m].sub_microbatch_tokens;
    const int count = static_cast<int>(tokens.size());
    int groups =
        static_cast<int>(std::min<int64_t>(count, (sum + target - 1) / target));
    const auto tokens_of = [&tokens](const std::vector<int>& group) {
      int64_t total = 0;
      for (int i : group) total += tokens[i];
      return total;
    };
    for (;;) {
      split[m] = SplitItems(weights, groups);
      const bool fits = largest_bucket == 0 ||
                        std::all_of(split[m].begin(), split[m].end(),
                                    [&](const std::vector<int>& group) {
                                      return tokens_of(group) <= largest_bucket;
                                    });
      if (fits) break;
      // Doubling ends at one item a group, which fits.
      groups = std::min(count, 2 * groups);
    }
  }
  for (size_t m = 0; m < job.modules.size(); ++m) {
    for (std::vector<int>& items : split[m]) {
      SubMicrobatch& sub = result->emplace_back();
      sub.module = static_cast<int>(m);
      sub.microbatch = b;
      for (int i : items) sub.tokens += microbatch.item_tokens[m][i];
      sub.items = std::move(items);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<SubMicrobatch>> SplitBatch(
    const Job& job, const semu::Layout& layout, const Batch& batch,
    WorkerPool* pool) {
  constexpr int kMicrobatchesPerJob = 8;
  const std::vector<int> order = semu::TopologicalOrder(job);
  std::vector<std::vector<GroupWeight>> group_weights;
  for (const semu::Module& module : job.modules) {
    group_weights.push_back(GroupWeights(module));
  }
  const int microbatches = static_cast<int>(batch.microbatches.size());
  const int jobs =
      (microbatches + kMicrobatchesPerJob - 1) / kMicrobatchesPerJob;
  std::vector<absl::Status> status(jobs);
  std::vector<std::vector<SubMicrobatch>> parts(jobs);
  RunOn(pool, jobs, [&](int, int part) {
    const int end = std::min(microbatches, (part + 1) * kMicrobatchesPerJob);
    for (int b = part * kMicrobatchesPerJob; b < end && status[part].ok();
         ++b) {
      status[part] = SplitMicrobatch(job, layout, order, group_weights,
                                     batch.microbatches[b], b, &parts[part]);
    }
  });
  std::vector<SubMicrobatch> result;
  size_t count = 0;
  for (const auto& part : parts) count += part.size();
  result.reserve(count);
  for (int part = 0; part < jobs; ++part) {
    PW_RETURN_IF_ERROR(status[part]);
    std::move(parts[part].begin(), parts[part].end(),
              std::back_inserter(result));
  }
  return result;
}

namespace {

// `condition`: ConditionTokens of the module.
semu::Shape ShapeOf(const Job& job, const Microbatch& microbatch,
                    const SubMicrobatch& sub_microbatch,
                    const std::vector<int64_t>& condition) {
  const int module = sub_microbatch.module;
  semu::Shape shape;
  const auto add = [&shape](int64_t n) {
    ++shape.items;
    shape.tokens += n;
    shape.sum_squares += n * n;
    shape.max_tokens = std::max(shape.max_tokens, n);
  };
  for (int i : sub_microbatch.items) {
    add(microbatch.item_tokens[module][i]);
    shape.condition_tokens += condition[i];
    shape.condition_products +=
        condition[i] * microbatch.item_tokens[module][i];
  }
  const std::vector<int64_t>& buckets = job.executor.shape_buckets;
  const auto bucket =
      std::lower_bound(buckets.begin(), buckets.end(), shape.tokens);
  if (bucket != buckets.end() && *bucket > shape.tokens) {
    add(*bucket - shape.tokens);
  }
  return shape;
}

}  // namespace

std::vector<semu::Shape> ShapesOf(
    const Job& job, const Batch& batch,
    absl::Span<const SubMicrobatch> sub_microbatches) {
  std::vector<semu::Shape> shapes;
  shapes.reserve(sub_microbatches.size());
  std::pair<int, int> known(-1, -1);  // microbatch, module
  std::vector<int64_t> condition;
  for (const SubMicrobatch& sub : sub_microbatches) {
    const Microbatch& microbatch = batch.microbatches[sub.microbatch];
    if (const std::pair of(sub.microbatch, sub.module); of != known) {
      condition = ConditionTokens(job, sub.module, microbatch);
      known = of;
    }
    shapes.push_back(ShapeOf(job, microbatch, sub, condition));
  }
  return shapes;
}

}  // namespace pipeweaver::search
