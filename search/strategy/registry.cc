// The strategies by name; see registry.h.

#include "search/strategy/registry.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "search/strategy/list_strategy.h"
#include "search/strategy/paper_strategy.h"
#include "search/strategy/portfolio.h"
#include "search/strategy/strategy.h"

namespace pipeweaver::search {

std::unique_ptr<Strategy> MakeStrategy(absl::string_view name) {
  if (name == "portfolio") return std::make_unique<PortfolioStrategy>();
  if (name == "paper") return std::make_unique<PaperStrategy>();
  if (name == "list") return std::make_unique<ListStrategy>();
  return nullptr;
}

std::vector<std::string> StrategyNames() {
  return {"portfolio", "list", "paper"};
}

}  // namespace pipeweaver::search
