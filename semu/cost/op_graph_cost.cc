// Passes are simulated one by one and put together into the figures that a
// stage's cost is made of.

#include "semu/cost/op_graph_cost.h"

#include <openssl/sha.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "semu/cost/layer_bytes.h"
#include "semu/graph/layer_expander.h"
#include "semu/graph/pass_simulator.h"
#include "semu/graph/subgraph_key.h"
#include "semu/store/memory_store.h"

namespace pipeweaver::semu {
namespace {

// Bound of every time (cost_model.h).
constexpr int64_t kMaxValue = 100'000'000'000'000;

// Platforms and sets of op kinds whose digests are remembered.
constexpr size_t kMaxDigests = 4096;

// Simulates passes of one layer, counting operations.
class LayerSimulator {
 public:
  LayerSimulator(const OpTimeRules& rules, const Platform& platform,
                 const LayerQuery& query)
      : graph_(ExpandLayer(platform, query)), op_ns_(graph_.ops.size()) {
    rules.TimeOps(platform, graph_.ops, absl::MakeSpan(op_ns_));
  }

  int64_t Ns(PassKind kind, MemoryStrategy strategy) {
    const Pass pass = PassOf(graph_, kind, strategy);
    ops_ += static_cast<int64_t>(pass.ops.size());
    return std::min(PassLatencyNs(graph_, pass, op_ns_), kMaxValue);
  }

  int64_t ops() const { return ops_; }

 private:
  const LayerGraph graph_;
  std::vector<int64_t> op_ns_;
  int64_t ops_ = 0;
};

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

}  // namespace

OpGraphCost::OpGraphCost(std::shared_ptr<const OpTimeRules> rules,
                         std::shared_ptr<SubgraphCache> cache)
    : rules_(std::move(rules)), cache_(std::move(cache)) {}

LayerCost OpGraphCost::Cost(const Platform& platform,
                            const LayerQuery& query) const {
  if (cache_ == nullptr) return Simulate(platform, query);
  const std::string key =
      SubgraphKey(platform, query, EntriesDigest(platform, query.layer));
  const std::string value = cache_->GetOrCompute(
      key, [&] { return EncodeLayerCost(Simulate(platform, query)); });
  if (const std::optional<LayerCost> cost = DecodeLayerCost(value)) {
    return *cost;
  }
  return Simulate(platform, query);
}

std::vector<LayerCost> OpGraphCost::CostAll(
    const Platform& platform, absl::Span<const LayerQuery> queries) const {
  if (cache_ == nullptr) return CostModel::CostAll(platform, queries);
  std::vector<std::string> keys;
  keys.reserve(queries.size());
  for (const LayerQuery& query : queries) {
    keys.push_back(
        SubgraphKey(platform, query, EntriesDigest(platform, query.layer)));
  }
  const std::vector<std::string> values =
      cache_->GetOrComputeAll(keys, [&](size_t i) {
        return EncodeLayerCost(Simulate(platform, queries[i]));
      });
  std::vector<LayerCost> costs;
  costs.reserve(queries.size());
  for (size_t i = 0; i < queries.size(); ++i) {
    const std::optional<LayerCost> cost = DecodeLayerCost(values[i]);
    costs.push_back(cost ? *cost : Simulate(platform, queries[i]));
  }
  return costs;
}

std::string OpGraphCost::Fingerprint() const {
  // The number counts changes of how passes make up a cost.
  return absl::StrCat("op graph 1 ", rules_->Fingerprint());
}

LayerCost OpGraphCost::Simulate(const Platform& platform,
                                const LayerQuery& query) const {
  LayerCost cost;
  SetLayerBytes(platform, query, &cost);
  LayerSimulator layer(*rules_, platform, query);
  const auto keep = MemoryStrategy::kKeep;
  const int64_t forward_ns = layer.Ns(PassKind::kForward, keep);
  for (StrategyCost& out : cost.strategies) out.forward_ns = forward_ns;
  if (query.input_grad || query.weight_grad) {
    cost.copy_ns = layer.Ns(PassKind::kOffload, keep);
    // Whatever the strategy, its operands are there by then.
    const int64_t weight_grad_ns =
        query.weight_grad ? layer.Ns(PassKind::kWeightGrad, keep) : 0;
    for (const MemoryStrategy strategy :
         {keep, MemoryStrategy::kSelectiveRecompute,
          MemoryStrategy::kFullRecompute}) {
      StrategyCost& out = cost.strategies[static_cast<int>(strategy)];
      out.input_grad_ns = layer.Ns(PassKind::kInputGrad, strategy);
      if (!query.weight_grad) continue;
      out.weight_grad_ns = weight_grad_ns;
      // The two halves one after the other are a backward, too.
      out.fused_backward_ns = std::min(layer.Ns(PassKind::kBackward, strategy),
                                       out.input_grad_ns + weight_grad_ns);
    }
    // What was offloaded is back by then.
    const StrategyCost& kept = cost[keep];
    StrategyCost& offload =
        cost.strategies[static_cast<int>(MemoryStrategy::kOffload)];
    offload.input_grad_ns = kept.input_grad_ns;
    offload.weight_grad_ns = kept.weight_grad_ns;
    offload.fused_backward_ns = kept.fused_backward_ns;
  }
  ops_simulated_.fetch_add(layer.ops(), std::memory_order_relaxed);
  return cost;
}

std::string OpGraphCost::EntriesDigest(const Platform& platform,
                                       const LayerSpec& layer) const {
  const OpKinds kinds = OpKindsOf(layer, platform.parallelism);
  std::string question = PlatformBytes(platform);
  question.push_back(static_cast<char>(kinds.to_ulong()));
  {
    MutexLock lock(&mutex_);
    const auto it = digests_.find(question);
    if (it != digests_.end()) return it->second;
  }
  const std::string entries = rules_->Entries(platform, kinds);
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(entries.data()), entries.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  MutexLock lock(&mutex_);
  if (digests_.size() >= kMaxDigests) digests_.clear();
  digests_.try_emplace(std::move(question), digest);
  return digest;
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

void PutInteger(int64_t value, std::string* out) {
  for (int i = 0; i < 8; ++i) {
    out->push_back(
        static_cast<char>(static_cast<uint64_t>(value) >> (8 * i) & 0xff));
  }
}

int64_t TakeInteger(const char** in) {
  uint64_t value = 0;
  for (int i = 0; i < 8; ++i) {
    value |= static_cast<uint64_t>(static_cast<unsigned char>(*(*in)++))
             << (8 * i);
  }
  return static_cast<int64_t>(value);
}

}  // namespace

std::string EncodeLayerCost(const LayerCost& cost) {
  std::string bytes;
  bytes.reserve(kCostIntegers * 8);
  for (const StrategyCost& s : cost.strategies) {
    for (const int64_t value :
         {s.forward_ns, s.input_grad_ns, s.weight_grad_ns,
          s.fused_backward_ns.value_or(kAbsent), s.kept_bytes, s.rebuilt_bytes,
          s.workspace_bytes, s.weight_grad_bytes, s.copy_bytes}) {
      PutInteger(value, &bytes);
    }
  }
  for (const int64_t value :
       {cost.forward_bytes, cost.copy_ns, cost.output_bytes}) {
    PutInteger(value, &bytes);
  }
  return bytes;
}

std::optional<LayerCost> DecodeLayerCost(absl::string_view bytes) {
  if (bytes.size() != kCostIntegers * 8) return std::nullopt;
  LayerCost cost;
  const char* in = bytes.data();
  for (StrategyCost& s : cost.strategies) {
    s.forward_ns = TakeInteger(&in);
    s.input_grad_ns = TakeInteger(&in);
    s.weight_grad_ns = TakeInteger(&in);
    const int64_t fused = TakeInteger(&in);
    if (fused != kAbsent) s.fused_backward_ns = fused;
    s.kept_bytes = TakeInteger(&in);
    s.rebuilt_bytes = TakeInteger(&in);
    s.workspace_bytes = TakeInteger(&in);
    s.weight_grad_bytes = TakeInteger(&in);
    s.copy_bytes = TakeInteger(&in);
  }
  cost.forward_bytes = TakeInteger(&in);
  cost.copy_ns = TakeInteger(&in);
  cost.output_bytes = TakeInteger(&in);
  return cost;
}

}  // namespace pipeweaver::semu
