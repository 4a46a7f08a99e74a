// Batch metadata as a value: sizes of items, and which items consume which.
// Mirrors batch.proto; semu/model/batch_proto.h converts and validates.

#ifndef SEMU_MODEL_BATCH_H_
#define SEMU_MODEL_BATCH_H_

#include <cstdint>
#include <vector>

namespace pipeweaver::semu {

// One use of a producer's item by a consumer's, over an edge of the module
// graph.
struct ItemUse {
  int producer_item = 0;
  int consumer_item = 0;

  bool operator==(const ItemUse&) const = default;
};

struct Microbatch {
  // Tokens of each item: [module][item]. Modules that inherit their items have
  // them filled in.
  std::vector<std::vector<int64_t>> item_tokens;
  // [edge]; edges into modules that inherit items are filled in.
  std::vector<std::vector<ItemUse>> uses;

  bool operator==(const Microbatch&) const = default;
};

// Of a batch that is a sample for a layout so many count.
constexpr int kSampleMicrobatches = 64;

struct Batch {
  std::vector<Microbatch> microbatches;
  bool forward_only = false;
};

// Memory that a batch takes.
int64_t HeldBytes(const Batch& batch);

}  // namespace pipeweaver::semu

#endif  // SEMU_MODEL_BATCH_H_
