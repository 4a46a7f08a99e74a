// Costs of layers from their operations: each layer is expanded into op graphs
// and simulated, unless a subgraph like it has been.

#ifndef SEMU_COST_OP_GRAPH_COST_H_
#define SEMU_COST_OP_GRAPH_COST_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "semu/base/mutex.h"
#include "semu/cost/cost_model.h"
#include "semu/cost/op_time.h"
#include "semu/store/subgraph_cache.h"

namespace pipeweaver::semu {

// Times come from the layer's simulated passes, bytes from layer_bytes.h.
// Thread-safe.
class OpGraphCost : public CostModel {
 public:
  // The default rules, every query simulated.
  OpGraphCost() : OpGraphCost(std::make_shared<DeviceOpTimes>(), nullptr) {}
  // `cache` may be null: every query is simulated. Costs are the same with any
  // cache, which several models may share.
  OpGraphCost(std::shared_ptr<const OpTimeRules> rules,
              std::shared_ptr<SubgraphCache> cache);
  ~OpGraphCost() override;

  LayerCost Cost(const Platform& platform,
                 const LayerQuery& query) const override;
  std::vector<LayerCost> CostAll(
      const Platform& platform,
      absl::Span<const LayerQuery> queries) const override;
  std::string Fingerprint() const override;

  // Operations simulated so far, over all passes.
  int64_t ops_simulated() const { return ops_simulated_; }

 private:
  // What costing a layer on a platform takes that no shape changes.
  struct Layer;
  // What of a query, its shape apart, tells layers of a platform apart.
  struct LayerQuestion;

  // The layers of queries.
  struct QueryLayers {
    std::vector<std::shared_ptr<const Layer>> distinct;
    std::vector<int> of_query;  // [query]: index into `distinct`

    const Layer& operator[](size_t query) const {
      return *distinct[of_query[query]];
    }
  };
  QueryLayers LayersOf(const Platform& platform,
                       absl::Span<const LayerQuery> queries) const;
  // What simulations need in between, kept from one to the next.
  struct Scratch {
    std::vector<Op> ops;
    std::vector<int64_t> op_ns;
  };
  LayerCost Simulate(const Platform& platform, const LayerQuery& query,
                     const Layer& layer, Scratch* scratch) const;

  const std::shared_ptr<const OpTimeRules> rules_;
  const std::shared_ptr<SubgraphCache> cache_;
  mutable std::atomic<int64_t> ops_simulated_ = 0;

  using Layers =
      absl::flat_hash_map<LayerQuestion, std::shared_ptr<const Layer>>;

  mutable Mutex mutex_;
  // What LayersOf has made, by the platform's bytes, and the operations of all.
  mutable absl::flat_hash_map<std::string, Layers> layers_
      ABSL_GUARDED_BY(mutex_);
  mutable int64_t remembered_ops_ ABSL_GUARDED_BY(mutex_) = 0;
};

// The default rules, with costs kept in this process's memory.
std::shared_ptr<const OpGraphCost> MakeReusingOpGraphCost();

// Little-endian integers of 8 bytes, the fields of LayerCost in their order; a
// fused backward that is absent is -1. `measured` is left out.
std::string EncodeLayerCost(const LayerCost& cost);

// Absent where `bytes` is not EncodeLayerCost of anything.
std::optional<LayerCost> DecodeLayerCost(absl::string_view bytes);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_OP_GRAPH_COST_H_
