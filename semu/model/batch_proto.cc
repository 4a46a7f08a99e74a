// Checks microbatch by microbatch and stops at the first rule that is broken.

#include "semu/model/batch_proto.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "semu/base/limits.h"
#include "semu/base/status_macros.h"
#include "semu/model/job_proto.h"
#include "semu/model/module_graph.h"
#include "semu/model/shape_buckets.h"

namespace pipeweaver::semu {
namespace {

constexpr int kMaxItemsOfModule = 65536;
constexpr int64_t kMaxItems = int64_t{1} << 20;
constexpr int64_t kMaxUses = int64_t{1} << 20;

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens of an item given by its size. At most 2^32 / 1 values a factor: the
// product is checked factor by factor.
absl::StatusOr<int64_t> GridTokens(const std::string& path, int item,
                                   const TokenGrid& grid, uint32_t height,
                                   uint32_t width, uint32_t frames) {
  if (height == 0 || width == 0 || frames == 0) {
    return Invalid(path, " item ", item, " has height ", height, ", width ",
                   width, ", frames ", frames, ": each must be at least 1");
  }
  const int64_t rows = CeilDiv(height, grid.pixels_per_token_height);
  const int64_t columns = CeilDiv(width, grid.pixels_per_token_width);
  const int64_t times = CeilDiv(frames, grid.frames_per_token);
  const double product = static_cast<double>(rows) *
                         static_cast<double>(columns) *
                         static_cast<double>(times);
  if (product > static_cast<double>(kMaxMicrobatchTokens)) {
    return Invalid(path, " item ", item, " has height ", height, ", width ",
                   width, ", frames ", frames, ": must make at most ",
                   kMaxMicrobatchTokens, " tokens");
  }
  return rows * columns * times;
}

absl::Status ReadItems(const std::string& path, const v1::ModuleItems& proto,
                       const Module& module, std::vector<int64_t>* tokens) {
  const bool by_size = proto.height_size() > 0 || proto.width_size() > 0 ||
                       proto.frames_size() > 0;
  if (by_size && proto.tokens_size() > 0) {
    return Invalid(path, " has ", proto.tokens_size(), " tokens and ",
                   proto.height_size(),
                   " heights: items are given by tokens or by size, not both");
  }
  const int count = by_size ? proto.height_size() : proto.tokens_size();
  if (count > kMaxItemsOfModule) {
    return Invalid(path, " has ", count, " items: must have at most ",
                   kMaxItemsOfModule);
  }
  if (by_size) {
    if (module.token_grid.pixels_per_token_height == 0) {
      return Invalid(path, ".height is set: module \"", module.name,
                     "\" has no token_grid, its items are given by tokens");
    }
    if (proto.width_size() != count) {
      return Invalid(path, ".width has ", proto.width_size(),
                     " values: must have as many as height, ", count);
    }
    if (proto.frames_size() != 0 && proto.frames_size() != count) {
      return Invalid(path, ".frames has ", proto.frames_size(),
                     " values: must be empty or have as many as height, ",
                     count);
    }
  }
  tokens->reserve(count);
  int64_t sum = 0;
  for (int i = 0; i < count; ++i) {
    int64_t n = 0;
    if (by_size) {
      PW_ASSIGN_OR_RETURN(
          n, GridTokens(path, i, module.token_grid, proto.height(i),
                        proto.width(i),
                        proto.frames_size() == 0 ? 1 : proto.frames(i)));
    } else {
      n = proto.tokens(i);
      if (n < 1) {
        return Invalid(path, ".tokens[", i, "] is ", n, ": must be at least 1");
      }
    }
    sum += n;
    if (sum > kMaxMicrobatchTokens) {
      return Invalid(path, " has more than ", kMaxMicrobatchTokens,
                     " tokens with item ", i,
                     ": a module has at most so many in a microbatch");
    }
    tokens->push_back(n);
  }
  return absl::OkStatus();
}

absl::Status ReadUses(const std::string& path, const v1::ItemUses& proto,
                      const ModuleEdge& edge, const Microbatch& microbatch,
                      std::vector<ItemUse>* uses) {
  const int count = proto.producer_item_size();
  if (proto.consumer_item_size() != count) {
    return Invalid(path, ".consumer_item has ", proto.consumer_item_size(),
                   " values: must have as many as producer_item, ", count);
  }
  const size_t producers = microbatch.item_tokens[edge.producer].size();
  const size_t consumers = microbatch.item_tokens[edge.consumer].size();
  std::vector<std::pair<int, int>> pairs;
  pairs.reserve(count);
  uses->reserve(count);
  for (int i = 0; i < count; ++i) {
    if (proto.producer_item(i) >= producers) {
      return Invalid(path, ".producer_item[", i, "] is ",
                     proto.producer_item(i), ": the producer has ", producers,
                     " items in this microbatch");
    }
    if (proto.consumer_item(i) >= consumers) {
      return Invalid(path, ".consumer_item[", i, "] is ",
                     proto.consumer_item(i), ": the consumer has ", consumers,
                     " items in this microbatch");
    }
    const int producer = static_cast<int>(proto.producer_item(i));
    const int consumer = static_cast<int>(proto.consumer_item(i));
    uses->push_back({producer, consumer});
    pairs.emplace_back(producer, consumer);
  }
  std::sort(pairs.begin(), pairs.end());
  const auto repeated = std::adjacent_find(pairs.begin(), pairs.end());
  if (repeated != pairs.end()) {
    return Invalid(path, " uses producer item ", repeated->first,
                   " for consumer item ", repeated->second,
                   " twice: a pair is listed once");
  }
  return absl::OkStatus();
}

// Fills in what modules without modality take over.
void Inherit(const Job& job, const std::vector<int>& order,
             Microbatch* microbatch) {
  for (int m : order) {
    const int e = InheritedEdge(job, m);
    if (e < 0) continue;
    const ModuleEdge& edge = job.edges[e];
    const std::vector<int64_t>& from = microbatch->item_tokens[edge.producer];
    std::vector<int64_t>& tokens = microbatch->item_tokens[m];
    for (size_t i = 0; i < from.size(); ++i) {
      tokens.push_back(CeilDiv(from[i], edge.tokens_merged));
      microbatch->uses[e].push_back({static_cast<int>(i), static_cast<int>(i)});
    }
  }
}

absl::Status CheckConsumption(const std::string& path, const Job& job,
                              const Microbatch& microbatch) {
  for (size_t m = 0; m < job.modules.size(); ++m) {
    const size_t count = microbatch.item_tokens[m].size();
    std::vector<bool> consumed(count, false);
    std::vector<int64_t> tokens(count, 0);
    bool has_consumers = false;
    for (size_t e = 0; e < job.edges.size(); ++e) {
      const ModuleEdge& edge = job.edges[e];
      if (edge.producer == static_cast<int>(m)) {
        has_consumers = true;
        for (const ItemUse& use : microbatch.uses[e]) {
          consumed[use.producer_item] = true;
        }
      }
      if (edge.consumer == static_cast<int>(m)) {
        for (const ItemUse& use : microbatch.uses[e]) {
          tokens[use.consumer_item] +=
              CeilDiv(microbatch.item_tokens[edge.producer][use.producer_item],
                      edge.tokens_merged);
        }
      }
    }
    const Module& module = job.modules[m];
    int64_t sum = 0;
    for (int64_t n : tokens) sum += n;
    if (sum > kMaxMicrobatchTokens) {
      return Invalid(path, ".uses make items of module \"", module.name,
                     "\" consume ", sum, " tokens in all: must be at most ",
                     kMaxMicrobatchTokens);
    }
    for (size_t i = 0; i < count; ++i) {
      if (has_consumers && !consumed[i] && !HasLoss(module)) {
        return Invalid(path, ".uses name item ", i, " of module \"",
                       module.name,
                       "\" on no edge: every item of a module that has "
                       "consumers and no loss must be consumed");
      }
      if (!IsConditioned(module) && tokens[i] > microbatch.item_tokens[m][i]) {
        return Invalid(path, " item ", i, " of module \"", module.name,
                       "\" has ", microbatch.item_tokens[m][i],
                       " tokens and consumes ", tokens[i],
                       ": its tokens must include those it consumes");
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Batch> BatchFromProto(const v1::BatchMetadata& proto,
                                     const Job& job) {
  const int count = proto.microbatches_size();
  if (count < 1 || count > kMaxMicrobatches) {
    return Invalid("number of microbatches is ", count, ": must be 1 to ",
                   kMaxMicrobatches);
  }
  const std::vector<int> order = TopologicalOrder(job);
  const size_t num_modules = job.modules.size();
  const size_t num_edges = job.edges.size();
  Batch batch;
  batch.forward_only = proto.forward_only();
  batch.microbatches.reserve(count);
  int64_t num_items = 0;
  int64_t num_uses = 0;
  for (int b = 0; b < count; ++b) {
    const v1::Microbatch& in = proto.microbatches(b);
    const std::string path = absl::StrCat("microbatches[", b, "]");
    Microbatch& out = batch.microbatches.emplace_back();
    out.item_tokens.resize(num_modules);
    out.uses.resize(num_edges);

    std::vector<bool> listed(num_modules, false);
    for (int i = 0; i < in.items_size(); ++i) {
      const uint32_t m = in.items(i).module();
      const std::string at = absl::StrCat(path, ".items[", i, "]");
      if (m >= num_modules) {
        return Invalid(at, ".module is ", m, ": the job has ", num_modules,
                       " modules");
      }
      if (listed[m]) {
        return Invalid(at, ".module is ", m,
                       ": a module is listed once in a microbatch");
      }
      listed[m] = true;
      if (InheritedEdge(job, static_cast<int>(m)) >= 0) {
        return Invalid(at, ".module is ", m, ": module \"", job.modules[m].name,
                       "\" has no modality, its items are its producer's");
      }
      PW_RETURN_IF_ERROR(
          ReadItems(at, in.items(i), job.modules[m], &out.item_tokens[m]));
    }
    Inherit(job, order, &out);

    std::vector<bool> used(num_edges, false);
    for (int i = 0; i < in.uses_size(); ++i) {
      const uint32_t e = in.uses(i).edge();
      const std::string at = absl::StrCat(path, ".uses[", i, "]");
      if (e >= num_edges) {
        return Invalid(at, ".edge is ", e, ": the job has ", num_edges,
                       " edges");
      }
      if (used[e]) {
        return Invalid(at, ".edge is ", e,
                       ": an edge is listed once in a microbatch");
      }
      used[e] = true;
      const ModuleEdge& edge = job.edges[e];
      if (InheritedEdge(job, edge.consumer) >= 0) {
        return Invalid(at, ".edge is ", e, ": module \"",
                       job.modules[edge.consumer].name,
                       "\" has no modality, its items consume its producer's "
                       "one for one");
      }
      PW_RETURN_IF_ERROR(ReadUses(at, in.uses(i), edge, out, &out.uses[e]));
      num_uses += in.uses(i).producer_item_size();
    }
    PW_RETURN_IF_ERROR(CheckConsumption(path, job, out));
    PW_RETURN_IF_ERROR(CheckShapeBuckets(job, out, b));

    for (const std::vector<int64_t>& items : out.item_tokens) {
      num_items += static_cast<int64_t>(items.size());
    }
    if (num_items > kMaxItems || num_uses > kMaxUses) {
      return Invalid("microbatches have ", num_items, " items and ", num_uses,
                     " uses up to ", path, ": must have at most ", kMaxItems,
                     " and ", kMaxUses);
    }
  }
  if (num_items == 0) {
    return Invalid("microbatches have 0 items: must have at least one in all");
  }
  return batch;
}

absl::StatusOr<std::vector<Batch>> SampleBatchesFromProto(
    const google::protobuf::RepeatedPtrField<v1::BatchMetadata>& protos,
    const Job& job) {
  if (protos.size() > kMaxSampleBatches) {
    return Invalid("sample_batches: ", protos.size(),
                   " batches: must be at most ", kMaxSampleBatches);
  }
  std::vector<Batch> samples;
  int64_t items = 0;
  for (int i = 0; i < protos.size(); ++i) {
    const std::string field = absl::StrCat("sample_batches[", i, "]");
    if (protos[i].forward_only()) {
      return Invalid(field,
                     ".forward_only is true: must be false, layouts are "
                     "for training");
    }
    absl::StatusOr<Batch> batch = BatchFromProto(protos[i], job);
    if (!batch.ok()) {
      return absl::Status(batch.status().code(),
                          absl::StrCat(field, ": ", batch.status().message()));
    }
    for (const Microbatch& microbatch : batch->microbatches) {
      for (const auto& tokens : microbatch.item_tokens) {
        items += static_cast<int64_t>(tokens.size());
      }
    }
    if (items > kMaxItems) {
      return Invalid(items, " items up to ", field, ": must be at most ",
                     kMaxItems, " in all sample_batches");
    }
    // What does not count is not held while a registration waits.
    if (batch->microbatches.size() > kSampleMicrobatches) {
      batch->microbatches.resize(kSampleMicrobatches);
      batch->microbatches.shrink_to_fit();
    }
    samples.push_back(*std::move(batch));
  }
  return samples;
}

v1::BatchMetadata BatchToProto(const Batch& batch, const Job& job) {
  v1::BatchMetadata proto;
  proto.set_forward_only(batch.forward_only);
  for (const Microbatch& microbatch : batch.microbatches) {
    v1::Microbatch* out = proto.add_microbatches();
    for (size_t m = 0; m < microbatch.item_tokens.size(); ++m) {
      const std::vector<int64_t>& tokens = microbatch.item_tokens[m];
      if (tokens.empty() || InheritedEdge(job, static_cast<int>(m)) >= 0) {
        continue;
      }
      v1::ModuleItems* items = out->add_items();
      items->set_module(static_cast<uint32_t>(m));
      items->mutable_tokens()->Add(tokens.begin(), tokens.end());
    }
    for (size_t e = 0; e < microbatch.uses.size(); ++e) {
      if (microbatch.uses[e].empty() ||
          InheritedEdge(job, job.edges[e].consumer) >= 0) {
        continue;
      }
      v1::ItemUses* uses = out->add_uses();
      uses->set_edge(static_cast<uint32_t>(e));
      for (const ItemUse& use : microbatch.uses[e]) {
        uses->add_producer_item(use.producer_item);
        uses->add_consumer_item(use.consumer_item);
      }
    }
  }
  return proto;
}

}  // namespace pipeweaver::semu
