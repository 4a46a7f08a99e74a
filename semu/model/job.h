// A training job as a value: modules, devices, links and what the executor can
// do. Mirrors job.proto, where every field is explained; semu/model/job_proto.h
// converts and validates.

#ifndef SEMU_MODEL_JOB_H_
#define SEMU_MODEL_JOB_H_

#include <cstdint>
#include <string>
#include <vector>

namespace pipeweaver::semu {

enum class Modality { kInherited, kText, kImage, kVideo, kAudio };

enum class LayerKind {
  kTransformer,
  kDit,
  kEmbedding,
  kLmHead,
  kPatchEmbed,
  kProjector,
};

struct LayerSpec {
  LayerKind kind = LayerKind::kTransformer;
  int64_t hidden_size = 0;
  int64_t ffn_size = 0;
  int heads = 0;
  int kv_heads = 0;  // never 0 for layers with attention
  bool gated_ffn = false;
  bool causal = false;
  int64_t vocab_size = 0;
  int64_t input_size = 0;

  bool operator==(const LayerSpec&) const = default;
};

struct LayerGroup {
  LayerSpec layer;
  int count = 0;
};

struct TokenGrid {
  int pixels_per_token_height = 0;  // 0: items are given in tokens only
  int pixels_per_token_width = 0;
  int frames_per_token = 1;
};

struct Module {
  std::string name;
  Modality modality = Modality::kInherited;
  std::vector<LayerGroup> layers;
  bool frozen = false;
  TokenGrid token_grid;

  int NumLayers() const {
    int n = 0;
    for (const LayerGroup& group : layers) n += group.count;
    return n;
  }
};

struct ModuleEdge {
  int producer = 0;  // indices into Job::modules
  int consumer = 0;
  int tokens_merged = 1;
};

struct Parallelism {
  int tensor_parallel = 1;
  int pipeline_parallel = 1;
  int context_parallel = 1;
  int data_parallel = 1;
};

enum class DataType { kBf16, kFp16, kFp32 };

constexpr int64_t DataTypeBytes(DataType type) {
  return type == DataType::kFp32 ? 4 : 2;
}

enum class OptimizerSharding { kNone, kStates, kStatesAndGradients };

struct Device {
  std::string name;
  int64_t peak_flops_per_second = 0;
  int64_t memory_bandwidth_bytes_per_second = 0;
  int64_t memory_bytes = 0;
};

struct Link {
  int64_t latency_ns = 0;
  int64_t bandwidth_bytes_per_second = 0;
};

struct Links {
  Link tensor_parallel;
  Link p2p_intra_node;
  Link p2p_inter_node;
  int gpus_per_node = 8;
  Link host;
};

struct ExecutorCapabilities {
  bool split_backward = false;
  bool selective_recompute = false;
  bool full_recompute = false;
  bool offload = false;
  bool v_placement = false;
  bool batched_p2p = false;
  int max_receives_ahead = 2;
  int max_segments = 4;
  std::vector<int64_t> shape_buckets;
  bool moved_microbatches = false;
};

struct Chunk {
  int rank = 0;
  int first_layer = 0;
  int num_layers = 0;
};

struct PipelineSegment {
  std::vector<Chunk> chunks;
};

struct ModuleLayout {
  std::vector<PipelineSegment> segments;
  int64_t sub_microbatch_tokens = 0;
};

// One entry a module, in the order of Job::modules.
struct Layout {
  std::vector<ModuleLayout> modules;
};

struct Job {
  std::string name;
  std::vector<Module> modules;
  std::vector<ModuleEdge> edges;
  Parallelism parallelism;
  DataType data_type = DataType::kBf16;
  OptimizerSharding optimizer_sharding = OptimizerSharding::kNone;
  Device device;
  Links links;
  int64_t memory_budget_bytes = 0;  // never 0 in a validated job
  ExecutorCapabilities executor;
  std::vector<int64_t> max_microbatch_tokens;  // one a module
};

}  // namespace pipeweaver::semu

#endif  // SEMU_MODEL_JOB_H_
