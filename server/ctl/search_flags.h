// The flags of a search, the same for all commands that make one.

#ifndef SERVER_CTL_SEARCH_FLAGS_H_
#define SERVER_CTL_SEARCH_FLAGS_H_

#include <cstdint>

#include "CLI/CLI.hpp"
#include "search/strategy/strategy.h"

namespace pipeweaver::ctl {

struct SearchFlags {
  uint64_t seed = 1;
  int64_t budget_evals = 0;  // 0: bounded by budget_ms
  int64_t budget_ms = 50;
  int threads = 2;

  void AddTo(CLI::App& app);

  // The search that the flags ask for, its time counted from now.
  search::SearchOptions Options() const;
};

}  // namespace pipeweaver::ctl

#endif  // SERVER_CTL_SEARCH_FLAGS_H_
