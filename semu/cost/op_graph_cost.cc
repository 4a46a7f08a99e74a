// Passes are simulated one by one and put together into the figures that a
// stage's cost is made of.

#include "semu/cost/op_graph_cost.h"

#include <openssl/sha.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "semu/graph/subgraph_key.h"
#include "semu/model/layer_size.h"

namespace pipeweaver::semu {
namespace {

// Bound of every time and size (cost_model.h).
constexpr int64_t kMaxValue = 100'000'000'000'000;

// Platforms and sets of op kinds whose digests are remembered.
constexpr size_t kMaxDigests = 4096;

int64_t Bounded(int64_t value) { return std::min(value, kMaxValue); }

int64_t SumOfBytes(const LayerGraph& graph, const std::vector<int>& tensors) {
  int64_t bytes = 0;
  for (const int tensor : tensors) bytes += graph.tensor_bytes[tensor];
  return bytes;
}

int64_t OutputBytes(const Platform& platform, const LayerQuery& query) {
  const int64_t cp = platform.parallelism.context_parallel;
  const int64_t tp = platform.parallelism.tensor_parallel;
  const int64_t rows = (query.shape.tokens + cp - 1) / cp;
  return (rows + tp - 1) / tp * OutputWidth(query.layer) *
         DataTypeBytes(platform.data_type);
}

LayerCost CostOf(const SimulatedLayer& layer, const Platform& platform,
                 const LayerQuery& query) {
  const LayerGraph& graph = layer.graph;
  const auto keep = MemoryStrategy::kKeep;
  const PassFigures& forward = layer(PassKind::kForward, keep);
  const int64_t saved_bytes = SumOfBytes(graph, graph.saved);
  LayerCost cost;
  cost.forward_bytes =
      Bounded(forward.peak_bytes - graph.tensor_bytes[graph.input]);
  cost.copy_ns = Bounded(layer(PassKind::kOffload, keep).latency_ns);
  cost.output_bytes = Bounded(OutputBytes(platform, query));
  for (int s = 0; s < kNumMemoryStrategies; ++s) {
    const auto strategy = static_cast<MemoryStrategy>(s);
    StrategyCost& out = cost.strategies[s];
    out.forward_ns = Bounded(forward.latency_ns);
    if (!query.input_grad && !query.weight_grad) continue;
    const int64_t kept_bytes = SumOfBytes(graph, KeptTensors(graph, strategy));
    const PassFigures& input_grad = layer(PassKind::kInputGrad, strategy);
    const PassFigures& backward = layer(PassKind::kBackward, strategy);
    out.input_grad_ns = Bounded(input_grad.latency_ns);
    out.kept_bytes = Bounded(kept_bytes);
    out.rebuilt_bytes = Bounded(saved_bytes) - out.kept_bytes;
    out.workspace_bytes = Bounded(std::max<int64_t>(
        0, std::max(input_grad.peak_bytes, backward.peak_bytes) - saved_bytes));
    if (strategy == MemoryStrategy::kOffload) {
      out.copy_bytes = Bounded(saved_bytes);
    }
    if (!query.weight_grad) continue;
    const PassFigures& weight_grad = layer(PassKind::kWeightGrad, strategy);
    out.weight_grad_ns = Bounded(weight_grad.latency_ns);
    // The two halves one after the other are a backward, too.
    out.fused_backward_ns = std::min(Bounded(backward.latency_ns),
                                     out.input_grad_ns + out.weight_grad_ns);
    out.weight_grad_bytes = Bounded(
        input_grad.kept_bytes -
        (graph.input_grad < 0 ? 0 : graph.tensor_bytes[graph.input_grad]));
  }
  return cost;
}

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

SimulatedLayer SimulateLayer(const OpTimeRules& rules, const Platform& platform,
                             const LayerQuery& query) {
  SimulatedLayer layer;
  layer.graph = ExpandLayer(platform, query);
  std::vector<int64_t> op_ns(layer.graph.ops.size());
  rules.TimeOps(platform, layer.graph.ops, absl::MakeSpan(op_ns));
  const auto simulate = [&](PassKind kind, MemoryStrategy strategy) {
    const Pass pass = PassOf(layer.graph, kind, strategy);
    layer.passes[static_cast<int>(kind)][static_cast<int>(strategy)] =
        SimulatePass(layer.graph, pass, op_ns);
    layer.ops += static_cast<int64_t>(pass.ops.size());
  };
  const auto same = [&](PassKind kind, MemoryStrategy as, MemoryStrategy to) {
    PassFigures* passes = layer.passes[static_cast<int>(kind)];
    passes[static_cast<int>(to)] = passes[static_cast<int>(as)];
  };
  const auto keep = MemoryStrategy::kKeep;
  simulate(PassKind::kForward, keep);
  if (!query.input_grad && !query.weight_grad) return layer;
  simulate(PassKind::kOffload, keep);
  for (const PassKind kind :
       {PassKind::kInputGrad, PassKind::kWeightGrad, PassKind::kBackward}) {
    simulate(kind, keep);
    // What was offloaded is back, and what the weight gradient reads is there.
    same(kind, keep, MemoryStrategy::kOffload);
    for (const MemoryStrategy strategy : {MemoryStrategy::kSelectiveRecompute,
                                          MemoryStrategy::kFullRecompute}) {
      if (kind == PassKind::kWeightGrad) {
        same(kind, keep, strategy);
      } else {
        simulate(kind, strategy);
      }
    }
  }
  return layer;
}

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

std::string OpGraphCost::Fingerprint() const {
  // The number counts changes of how passes make up a cost.
  return absl::StrCat("op graph 1 ", rules_->Fingerprint());
}

LayerCost OpGraphCost::Simulate(const Platform& platform,
                                const LayerQuery& query) const {
  const SimulatedLayer layer = SimulateLayer(*rules_, platform, query);
  ops_simulated_.fetch_add(layer.ops, std::memory_order_relaxed);
  return CostOf(layer, platform, query);
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
