// The strategies by name.

#ifndef SEARCH_STRATEGY_REGISTRY_H_
#define SEARCH_STRATEGY_REGISTRY_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "search/strategy/strategy.h"

namespace pipeweaver::search {

// Null when there is no strategy of that name.
std::unique_ptr<Strategy> MakeStrategy(absl::string_view name);

// All names that MakeStrategy knows, the default first.
std::vector<std::string> StrategyNames();

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_REGISTRY_H_
