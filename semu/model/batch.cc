#include "semu/model/batch.h"

namespace pipeweaver::semu {
namespace {

template <typename T>
int64_t BytesOf(const std::vector<std::vector<T>>& rows) {
  int64_t bytes = static_cast<int64_t>(rows.capacity() * sizeof(rows[0]));
  for (const std::vector<T>& row : rows) {
    bytes += static_cast<int64_t>(row.capacity() * sizeof(T));
  }
  return bytes;
}

}  // namespace

int64_t HeldBytes(const Batch& batch) {
  int64_t bytes =
      static_cast<int64_t>(batch.microbatches.capacity() * sizeof(Microbatch));
  for (const Microbatch& microbatch : batch.microbatches) {
    bytes += BytesOf(microbatch.item_tokens) + BytesOf(microbatch.uses);
  }
  return bytes;
}

}  // namespace pipeweaver::semu
