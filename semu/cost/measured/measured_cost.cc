// Layer costs from measured layers.

#include "semu/cost/measured/measured_cost.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pipeweaver::semu {
namespace {

using Points = std::vector<MeasuredLayer>;

auto LayerTuple(const LayerSpec& layer) {
  return std::make_tuple(static_cast<int>(layer.kind), layer.hidden_size,
                         layer.ffn_size, layer.heads, layer.kv_heads,
                         layer.gated_ffn, layer.causal, layer.vocab_size,
                         layer.input_size);
}

// What points must share to be compared.
auto GroupTuple(const MeasuredLayer& point) {
  return std::make_tuple(LayerTuple(point.layer), point.tensor_parallel,
                         point.context_parallel, static_cast<int>(point.pass));
}

auto OrderTuple(const MeasuredLayer& point) {
  return std::make_tuple(GroupTuple(point), point.shape.tokens, point.shape);
}

std::vector<MeasuredLayer> Ordered(std::vector<MeasuredLayer> points) {
  std::erase_if(points, [](const MeasuredLayer& point) {
    return point.shape.tokens <= 0 || point.ns <= 0 || point.count <= 0;
  });
  std::stable_sort(points.begin(), points.end(), MeasuredBefore());
  std::vector<MeasuredLayer> merged;
  for (std::size_t begin = 0; begin < points.size();) {
    std::size_t end = begin;
    double sum_ns = 0;
    int64_t count = 0;
    while (end < points.size() &&
           OrderTuple(points[end]) == OrderTuple(points[begin])) {
      sum_ns += static_cast<double>(points[end].ns) *
                static_cast<double>(points[end].count);
      count += points[end++].count;
    }
    merged.push_back(points[begin]);
    merged.back().ns = std::llround(sum_ns / static_cast<double>(count));
    merged.back().count = count;
    begin = end;
  }
  return merged;
}

// The base's time of a pass when nothing is recomputed.
int64_t PassNs(const LayerCost& cost, MeasuredPass pass) {
  const StrategyCost& keep = cost[MemoryStrategy::kKeep];
  switch (pass) {
    case MeasuredPass::kForward:
      return keep.forward_ns;
    case MeasuredPass::kBackward:
      return keep.fused_backward_ns.value_or(keep.input_grad_ns +
                                             keep.weight_grad_ns);
    case MeasuredPass::kInputGrad:
      return keep.input_grad_ns;
    case MeasuredPass::kWeightGrad:
      return keep.weight_grad_ns;
  }
  return 0;
}

// Tokens of the condition that the mean token attends to.
double MeanCondition(const Shape& shape) {
  return static_cast<double>(shape.condition_products) /
         static_cast<double>(shape.tokens);
}

// Whether the length of the condition matters to `query`, but `shape` is silent
// about it.
bool LacksCondition(const Shape& shape, const LayerQuery& query) {
  return query.layer.kind == LayerKind::kDit &&
         query.shape.condition_products > 0 && shape.condition_products == 0;
}

// `shape`, its items attending to conditions as long as those of `query` where
// it does not say.
Shape WithCondition(Shape shape, const LayerQuery& query) {
  if (!LacksCondition(shape, query)) return shape;
  const double mean = MeanCondition(query.shape);
  shape.condition_products =
      std::llround(mean * static_cast<double>(shape.tokens));
  shape.condition_tokens = std::llround(
      mean * static_cast<double>(std::max<int64_t>(shape.items, 1)));
  return shape;
}

double ConditionDistance(const MeasuredLayer& point, const LayerQuery& query) {
  if (query.layer.kind != LayerKind::kDit) return 0;
  if (LacksCondition(point.shape, query)) return kMaxCost;
  return std::abs(MeanCondition(point.shape) - MeanCondition(query.shape));
}

// Whether the condition's length lies within those of `points`.
bool ConditionInside(absl::Span<const MeasuredLayer> points,
                     const LayerQuery& query) {
  if (query.layer.kind != LayerKind::kDit) return true;
  const double wanted = MeanCondition(query.shape);
  bool below = false;
  bool above = false;
  for (const MeasuredLayer& point : points) {
    if (LacksCondition(point.shape, query)) return true;
    below |= MeanCondition(point.shape) <= wanted;
    above |= MeanCondition(point.shape) >= wanted;
  }
  return below && above;
}

int64_t Scaled(int64_t ns, double factor) {
  return std::llround(
      std::min<double>(static_cast<double>(ns) * factor, kMaxCost));
}

}  // namespace

bool MeasuredBefore::operator()(const MeasuredLayer& a,
                                const MeasuredLayer& b) const {
  return OrderTuple(a) < OrderTuple(b);
}

MeasuredCost::MeasuredCost(const CostModel& base,
                           std::vector<MeasuredLayer> points)
    : base_(base), points_(Ordered(std::move(points))) {}

MeasuredCost::Ratio MeasuredCost::RatioAt(const Platform& platform,
                                          const LayerQuery& query,
                                          MeasuredPass pass) const {
  MeasuredLayer wanted;
  wanted.layer = query.layer;
  wanted.tensor_parallel = platform.parallelism.tensor_parallel;
  wanted.context_parallel = platform.parallelism.context_parallel;
  wanted.pass = pass;
  const auto begin =
      std::lower_bound(points_.begin(), points_.end(), wanted,
                       [](const MeasuredLayer& a, const MeasuredLayer& b) {
                         return GroupTuple(a) < GroupTuple(b);
                       });
  const auto end =
      std::upper_bound(begin, points_.end(), wanted,
                       [](const MeasuredLayer& a, const MeasuredLayer& b) {
                         return GroupTuple(a) < GroupTuple(b);
                       });
  if (begin == end) return {};
  const auto ratio_of = [&](const MeasuredLayer& point) {
    LayerQuery at_point = query;
    at_point.shape = WithCondition(point.shape, query);
    const int64_t predicted_ns = PassNs(base_.Cost(platform, at_point), pass);
    return predicted_ns <= 0 ? 1.0
                             : static_cast<double>(point.ns) /
                                   static_cast<double>(predicted_ns);
  };
  // An equal shape before others.
  const int64_t tokens = query.shape.tokens;
  const auto fewer = [](const MeasuredLayer& point, int64_t n) {
    return point.shape.tokens < n;
  };
  const auto above = std::lower_bound(begin, end, tokens, fewer);
  const auto exact = std::find_if(above, end, [&](const MeasuredLayer& point) {
    return point.shape == query.shape || point.shape.tokens > tokens;
  });
  if (exact != end && exact->shape == query.shape) {
    return {ratio_of(*exact), true, true};
  }
  const bool inside = ConditionInside(
      absl::MakeConstSpan(&*begin, static_cast<size_t>(end - begin)), query);
  // Of the points with as many tokens as `point`.
  const auto nearest_at = [&](Points::const_iterator point) {
    const int64_t n = point->shape.tokens;
    const auto first = std::lower_bound(begin, end, n, fewer);
    const auto last = std::lower_bound(first, end, n + 1, fewer);
    return *std::min_element(
        first, last, [&](const MeasuredLayer& a, const MeasuredLayer& b) {
          return ConditionDistance(a, query) < ConditionDistance(b, query);
        });
  };
  if (above == end) return {ratio_of(nearest_at(end - 1)), true, false};
  const MeasuredLayer high = nearest_at(above);
  if (above->shape.tokens == tokens) return {ratio_of(high), true, inside};
  if (above == begin) return {ratio_of(high), true, false};
  const MeasuredLayer low = nearest_at(above - 1);
  const double weight = std::log(static_cast<double>(tokens) /
                                 static_cast<double>(low.shape.tokens)) /
                        std::log(static_cast<double>(high.shape.tokens) /
                                 static_cast<double>(low.shape.tokens));
  const double low_ratio = ratio_of(low);
  return {low_ratio + weight * (ratio_of(high) - low_ratio), true, inside};
}

LayerCost MeasuredCost::Cost(const Platform& platform,
                             const LayerQuery& query) const {
  LayerCost cost = base_.Cost(platform, query);
  Correct(platform, query, &cost);
  return cost;
}

std::vector<LayerCost> MeasuredCost::CostAll(
    const Platform& platform, absl::Span<const LayerQuery> queries) const {
  std::vector<LayerCost> costs = base_.CostAll(platform, queries);
  for (size_t i = 0; i < queries.size(); ++i) {
    Correct(platform, queries[i], &costs[i]);
  }
  return costs;
}

void MeasuredCost::Correct(const Platform& platform, const LayerQuery& query,
                           LayerCost* cost) const {
  if (query.shape.tokens <= 0 || points_.empty()) return;
  const bool backward = query.input_grad || query.weight_grad;
  const Ratio forward = RatioAt(platform, query, MeasuredPass::kForward);
  Ratio fused;
  Ratio input_grad;
  Ratio weight_grad;
  if (backward) {
    // A measured backward holds both gradients, so it says nothing of a layer
    // that lacks one.
    if (query.input_grad && query.weight_grad) {
      fused = RatioAt(platform, query, MeasuredPass::kBackward);
    }
    input_grad = RatioAt(platform, query, MeasuredPass::kInputGrad);
    weight_grad = RatioAt(platform, query, MeasuredPass::kWeightGrad);
    if (!input_grad.known) input_grad = fused;
    if (!weight_grad.known) weight_grad = fused;
  }
  for (StrategyCost& strategy : cost->strategies) {
    const int64_t parts_ns = strategy.input_grad_ns + strategy.weight_grad_ns;
    strategy.forward_ns = Scaled(strategy.forward_ns, forward.value);
    strategy.input_grad_ns = Scaled(strategy.input_grad_ns, input_grad.value);
    strategy.weight_grad_ns =
        Scaled(strategy.weight_grad_ns, weight_grad.value);
    if (!strategy.fused_backward_ns) continue;
    const double parts_ratio =
        parts_ns <= 0 ? 1
                      : static_cast<double>(strategy.input_grad_ns +
                                            strategy.weight_grad_ns) /
                            static_cast<double>(parts_ns);
    strategy.fused_backward_ns = Scaled(
        *strategy.fused_backward_ns, fused.known ? fused.value : parts_ratio);
  }
  cost->measured = forward.inside &&
                   (!query.input_grad || input_grad.inside || fused.inside) &&
                   (!query.weight_grad || weight_grad.inside || fused.inside);
}

std::optional<int64_t> MeasuredCost::PredictNs(
    const Platform& platform, const MeasuredLayer& point) const {
  Platform own = platform;
  own.parallelism.tensor_parallel = point.tensor_parallel;
  own.parallelism.context_parallel = point.context_parallel;
  LayerQuery query;
  query.layer = point.layer;
  query.shape = point.shape;
  const Ratio ratio = RatioAt(own, query, point.pass);
  if (!ratio.inside) return std::nullopt;
  return Scaled(PassNs(base_.Cost(own, query), point.pass), ratio.value);
}

std::string MeasuredCost::Fingerprint() const {
  std::string fingerprint = absl::StrCat(base_.Fingerprint(), " measured");
  for (const MeasuredLayer& p : points_) {
    absl::StrAppend(&fingerprint, " ", static_cast<int>(p.layer.kind), ",",
                    p.layer.hidden_size, ",", p.layer.ffn_size, ",",
                    p.layer.heads, ",", p.layer.kv_heads, ",");
    absl::StrAppend(&fingerprint, p.layer.gated_ffn, ",", p.layer.causal, ",",
                    p.layer.vocab_size, ",", p.layer.input_size, ":",
                    p.tensor_parallel, ",", p.context_parallel, ",",
                    static_cast<int>(p.pass), ":");
    absl::StrAppend(&fingerprint, p.shape.items, ",", p.shape.tokens, ",",
                    p.shape.sum_squares, ",", p.shape.max_tokens, ",");
    absl::StrAppend(&fingerprint, p.shape.condition_tokens, ",",
                    p.shape.condition_products, ":", p.ns);
  }
  return fingerprint;
}

}  // namespace pipeweaver::semu
