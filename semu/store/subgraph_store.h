// Where results of simulated subgraphs are kept: bytes by key. What keys and
// values mean is between those who put and those who get.

#ifndef SEMU_STORE_SUBGRAPH_STORE_H_
#define SEMU_STORE_SUBGRAPH_STORE_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace pipeweaver::semu {

struct StoreEntry {
  std::string key;
  std::string value;
};

// A store may forget what it was given, at any time; it never answers with a
// value that was not put under that very key. Trouble inside is a miss.
// Implementations are thread-safe.
class SubgraphStore {
 public:
  virtual ~SubgraphStore() = default;

  // One word, for labels.
  virtual absl::string_view name() const = 0;

  virtual std::optional<std::string> Get(absl::string_view key) = 0;

  // Get of each key. Stores for which many at once are cheaper override it.
  virtual std::vector<std::optional<std::string>> GetAll(
      absl::Span<const absl::string_view> keys) {
    std::vector<std::optional<std::string>> values;
    values.reserve(keys.size());
    for (const absl::string_view key : keys) values.push_back(Get(key));
    return values;
  }

  virtual void Put(absl::Span<const StoreEntry> entries) = 0;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_SUBGRAPH_STORE_H_
