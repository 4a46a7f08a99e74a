// Passes are simulated one by one and put together into the figures that a
// stage's cost is made of. All that a shape does not change is found once for
// each layer and platform.

#include "semu/cost/op_graph_cost.h"

#include <openssl/sha.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "semu/base/little_endian.h"
#include "semu/cost/layer_bytes.h"
#include "semu/graph/layer_expander.h"
#include "semu/graph/pass_simulator.h"
#include "semu/graph/subgraph_key.h"
#include "semu/store/memory_store.h"

namespace pipeweaver::semu {
namespace {

// Operations of remembered layers, of some 300 bytes each.
constexpr int64_t kMaxRememberedOps = 1 << 17;

template <typename T>
void AppendBytes(const T& value, std::string* out) {
  static_assert(std::is_trivially_copyable_v<T> &&
                std::has_unique_object_representations_v<T>);
  out->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// Everything that an OpTimeRules may read of a platform.
std::string PlatformBytes(const Platform& platform) {
  std::string bytes;
  bytes.reserve(160 + platform.device.name.size());
  AppendBytes(platform.parallelism, &bytes);
  AppendBytes(platform.data_type, &bytes);
  AppendBytes(platform.device.peak_flops_per_second, &bytes);
  AppendBytes(platform.device.memory_bandwidth_bytes_per_second, &bytes);
  AppendBytes(platform.device.memory_bytes, &bytes);
  AppendBytes(platform.links.tensor_parallel, &bytes);
  AppendBytes(platform.links.p2p_intra_node, &bytes);
  AppendBytes(platform.links.p2p_inter_node, &bytes);
  AppendBytes(platform.links.gpus_per_node, &bytes);
  AppendBytes(platform.links.host, &bytes);
  bytes += platform.device.name;
  return bytes;
}

std::string Sha256(absl::string_view bytes) {
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

// The strategies whose backwards differ in time.
constexpr MemoryStrategy kTimedStrategies[] = {
    MemoryStrategy::kKeep, MemoryStrategy::kSelectiveRecompute,
    MemoryStrategy::kFullRecompute};

}  // namespace

struct OpGraphCost::LayerQuestion {
  LayerSpec layer;
  bool weight_grad = false;
  bool input_grad = false;

  bool operator==(const LayerQuestion&) const = default;

  template <typename H>
  friend H AbslHashValue(H h, const LayerQuestion& q) {
    return H::combine(std::move(h), q.layer.kind, q.layer.hidden_size,
                      q.layer.ffn_size, q.layer.heads, q.layer.kv_heads,
                      q.layer.vocab_size, q.layer.input_size, q.weight_grad,
                      q.input_grad);
  }
};

struct OpGraphCost::Layer {
  struct Backward {
    MemoryStrategy strategy;
    PassLatency input_grad;
    // With weight gradients only.
    std::optional<PassLatency> fused;
  };

  Layer(const Platform& platform, const LayerQuestion& question)
      : ops(ExpandTemplate(platform, question.layer, question.weight_grad,
                           question.input_grad)),
        forward(Latency(PassKind::kForward, MemoryStrategy::kKeep)) {
    if (!question.input_grad && !question.weight_grad) return;
    offload = Latency(PassKind::kOffload, MemoryStrategy::kKeep);
    if (question.weight_grad) {
      // Whatever the strategy, its operands are there by then.
      weight_grad = Latency(PassKind::kWeightGrad, MemoryStrategy::kKeep);
    }
    for (const MemoryStrategy strategy : kTimedStrategies) {
      Backward& backward = backwards.emplace_back(
          Backward{strategy, Latency(PassKind::kInputGrad, strategy), {}});
      if (question.weight_grad) {
        backward.fused = Latency(PassKind::kBackward, strategy);
      }
    }
  }

  LayerTemplate ops;
  int64_t pass_ops = 0;  // over all passes below
  PassLatency forward;
  std::optional<PassLatency> offload;
  std::optional<PassLatency> weight_grad;
  std::vector<Backward> backwards;
  std::string entries_digest;

 private:
  PassLatency Latency(PassKind kind, MemoryStrategy strategy) {
    PassLatency latency(ops.graph, PassOf(ops.graph, kind, strategy));
    pass_ops += latency.num_ops();
    return latency;
  }
};

OpGraphCost::OpGraphCost(std::shared_ptr<const OpTimeRules> rules,
                         std::shared_ptr<SubgraphCache> cache)
    : rules_(std::move(rules)), cache_(std::move(cache)) {}

OpGraphCost::~OpGraphCost() = default;

LayerCost OpGraphCost::Cost(const Platform& platform,
                            const LayerQuery& query) const {
  return CostAll(platform, {&query, 1})[0];
}

std::vector<LayerCost> OpGraphCost::CostAll(
    const Platform& platform, absl::Span<const LayerQuery> queries) const {
  const QueryLayers layers = LayersOf(platform, queries);
  Scratch scratch;
  const auto simulate = [&](size_t i) {
    return Simulate(platform, queries[i], layers[i], &scratch);
  };
  std::vector<LayerCost> costs;
  costs.reserve(queries.size());
  if (cache_ == nullptr) {
    for (size_t i = 0; i < queries.size(); ++i) costs.push_back(simulate(i));
    return costs;
  }
  std::vector<std::string> keys;
  keys.reserve(queries.size());
  for (size_t i = 0; i < queries.size(); ++i) {
    keys.push_back(SubgraphKey(platform, queries[i], layers[i].entries_digest));
  }
  const std::vector<std::string> values = cache_->GetOrComputeAll(
      keys, [&](size_t i) { return EncodeLayerCost(simulate(i)); });
  for (size_t i = 0; i < queries.size(); ++i) {
    const std::optional<LayerCost> cost = DecodeLayerCost(values[i]);
    costs.push_back(cost ? *cost : simulate(i));
  }
  return costs;
}

std::string OpGraphCost::Fingerprint() const {
  // The number counts changes of how passes make up a cost.
  return absl::StrCat("op graph 1 ", rules_->Fingerprint());
}

LayerCost OpGraphCost::Simulate(const Platform& platform,
                                const LayerQuery& query, const Layer& layer,
                                Scratch* scratch) const {
  LayerCost cost;
  SetLayerBytes(platform, query, &cost);
  layer.ops.SetOpsAt(query.shape, &scratch->ops);
  std::vector<int64_t>& op_ns = scratch->op_ns;
  op_ns.assign(scratch->ops.size(), 0);
  rules_->TimeOps(platform, scratch->ops, absl::MakeSpan(op_ns));
  ops_simulated_.fetch_add(layer.pass_ops, std::memory_order_relaxed);
  const auto latency_ns = [&op_ns](const PassLatency& pass) {
    return std::min(pass.Ns(op_ns), kMaxCost);
  };

  const int64_t forward_ns = latency_ns(layer.forward);
  for (StrategyCost& out : cost.strategies) out.forward_ns = forward_ns;
  if (layer.offload) cost.copy_ns = latency_ns(*layer.offload);
  const int64_t weight_grad_ns =
      layer.weight_grad ? latency_ns(*layer.weight_grad) : 0;
  for (const Layer::Backward& backward : layer.backwards) {
    StrategyCost& out = cost.strategies[static_cast<int>(backward.strategy)];
    out.input_grad_ns = latency_ns(backward.input_grad);
    if (!backward.fused) continue;
    out.weight_grad_ns = weight_grad_ns;
    // The two halves one after the other are a backward, too.
    out.fused_backward_ns = std::min(latency_ns(*backward.fused),
                                     out.input_grad_ns + weight_grad_ns);
  }
  // What was offloaded is back by then.
  const StrategyCost& kept = cost[MemoryStrategy::kKeep];
  StrategyCost& offload =
      cost.strategies[static_cast<int>(MemoryStrategy::kOffload)];
  offload.input_grad_ns = kept.input_grad_ns;
  offload.weight_grad_ns = kept.weight_grad_ns;
  offload.fused_backward_ns = kept.fused_backward_ns;
  return cost;
}

OpGraphCost::QueryLayers OpGraphCost::LayersOf(
    const Platform& platform, absl::Span<const LayerQuery> queries) const {
  QueryLayers layers;
  layers.of_query.reserve(queries.size());
  // Few layers, each asked about at many shapes.
  std::vector<LayerQuestion> questions;
  for (const LayerQuery& query : queries) {
    const LayerQuestion question = {query.layer, query.weight_grad,
                                    query.input_grad};
    const auto it = std::find(questions.begin(), questions.end(), question);
    layers.of_query.push_back(static_cast<int>(it - questions.begin()));
    if (it == questions.end()) questions.push_back(question);
  }
  layers.distinct.reserve(questions.size());
  const std::string bytes = PlatformBytes(platform);
  MutexLock lock(&mutex_);
  Layers* known = &layers_[bytes];
  for (const LayerQuestion& question : questions) {
    const auto it = known->find(question);
    if (it != known->end()) {
      layers.distinct.push_back(it->second);
      continue;
    }
    // Under the lock, so that others wait for it in place of making it, too.
    auto layer = std::make_shared<Layer>(platform, question);
    if (cache_ != nullptr) {
      layer->entries_digest = Sha256(rules_->Entries(
          platform, OpKindsOf(question.layer, platform.parallelism)));
    }
    const auto num_ops = static_cast<int64_t>(layer->ops.graph.ops.size());
    if (remembered_ops_ + num_ops > kMaxRememberedOps) {
      layers_.clear();
      known = &layers_[bytes];
      remembered_ops_ = 0;
    }
    remembered_ops_ += num_ops;
    layers.distinct.push_back(
        known->emplace(question, std::move(layer)).first->second);
  }
  return layers;
}

std::shared_ptr<const OpGraphCost> MakeReusingOpGraphCost() {
  constexpr int64_t kBudgetBytes = 64 << 20;
  std::vector<std::unique_ptr<SubgraphStore>> levels;
  levels.push_back(std::make_unique<MemoryStore>(kBudgetBytes));
  return std::make_shared<OpGraphCost>(
      std::make_shared<DeviceOpTimes>(),
      std::make_shared<SubgraphCache>(std::move(levels)));
}

namespace {

constexpr int kStrategyIntegers = 9;
constexpr int kCostIntegers = kNumMemoryStrategies * kStrategyIntegers + 3;
constexpr int64_t kAbsent = -1;

}  // namespace

std::string EncodeLayerCost(const LayerCost& cost) {
  std::string bytes(kCostIntegers * 8, '\0');
  char* out = bytes.data();
  for (const StrategyCost& s : cost.strategies) {
    for (const int64_t value :
         {s.forward_ns, s.input_grad_ns, s.weight_grad_ns,
          s.fused_backward_ns.value_or(kAbsent), s.kept_bytes, s.rebuilt_bytes,
          s.workspace_bytes, s.weight_grad_bytes, s.copy_bytes}) {
      out = PutLittleEndian64(static_cast<uint64_t>(value), out);
    }
  }
  for (const int64_t value :
       {cost.forward_bytes, cost.copy_ns, cost.output_bytes}) {
    out = PutLittleEndian64(static_cast<uint64_t>(value), out);
  }
  return bytes;
}

std::optional<LayerCost> DecodeLayerCost(absl::string_view bytes) {
  if (bytes.size() != kCostIntegers * 8) return std::nullopt;
  const char* in = bytes.data();
  const auto take = [&in] {
    const auto value = static_cast<int64_t>(LittleEndian64(in));
    in += 8;
    return value;
  };
  std::optional<LayerCost> cost(std::in_place);
  for (StrategyCost& s : cost->strategies) {
    s.forward_ns = take();
    s.input_grad_ns = take();
    s.weight_grad_ns = take();
    const int64_t fused = take();
    if (fused != kAbsent) s.fused_backward_ns = fused;
    s.kept_bytes = take();
    s.rebuilt_bytes = take();
    s.workspace_bytes = take();
    s.weight_grad_bytes = take();
    s.copy_bytes = take();
  }
  cost->forward_bytes = take();
  cost->copy_ns = take();
  cost->output_bytes = take();
  return cost;
}

}  // namespace pipeweaver::semu
