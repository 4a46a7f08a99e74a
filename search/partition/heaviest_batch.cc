// See heaviest_batch.h.

#include "search/partition/heaviest_batch.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "search/partition/batch_split.h"
#include "semu/base/limits.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Job;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// [module]: most tokens of a microbatch such that no module that inherits its
// items has more than it may.
std::vector<int64_t> MostTokens(const Job& job) {
  std::vector<int64_t> most = job.max_microbatch_tokens;
  const std::vector<int> order = semu::TopologicalOrder(job);
  for (auto m = order.rbegin(); m != order.rend(); ++m) {
    const int inherited = semu::InheritedEdge(job, *m);
    if (inherited < 0) continue;
    const semu::ModuleEdge& edge = job.edges[inherited];
    int64_t& producer = most[edge.producer];
    if (producer / edge.tokens_merged > most[*m]) {
      producer = most[*m] * edge.tokens_merged;
    }
  }
  return most;
}

// Items of `length`, longer where they would be too many, and what is left.
std::vector<int64_t> EqualItems(int64_t tokens, int64_t length) {
  length = std::max(length, CeilDiv(tokens, semu::kMostBucketsFilled));
  std::vector<int64_t> items(tokens / length, length);
  if (tokens % length > 0) items.push_back(tokens % length);
  return items;
}

// `items_of`: the lengths of a module's items, given its most tokens.
semu::Batch BatchOf(
    const Job& job,
    const std::function<std::vector<int64_t>(int module, int64_t tokens)>&
        items_of) {
  const std::vector<int64_t> most = MostTokens(job);
  semu::Microbatch microbatch;
  microbatch.item_tokens.resize(job.modules.size());
  for (const int m : semu::TopologicalOrder(job)) {
    std::vector<int64_t>& items = microbatch.item_tokens[m];
    const int inherited = semu::InheritedEdge(job, m);
    if (inherited < 0) {
      items = items_of(m, most[m]);
      continue;
    }
    const semu::ModuleEdge& edge = job.edges[inherited];
    for (const int64_t tokens : microbatch.item_tokens[edge.producer]) {
      items.push_back(CrossingTokens(edge, tokens));
    }
  }
  for (size_t e = 0; e < job.edges.size(); ++e) {
    const semu::ModuleEdge& edge = job.edges[e];
    const std::vector<int64_t>& produced =
        microbatch.item_tokens[edge.producer];
    const int consumers =
        static_cast<int>(microbatch.item_tokens[edge.consumer].size());
    const bool inherits =
        semu::InheritedEdge(job, edge.consumer) == static_cast<int>(e);
    const auto shortest = static_cast<int>(
        std::min_element(produced.begin(), produced.end()) - produced.begin());
    std::vector<semu::ItemUse>& uses = microbatch.uses.emplace_back();
    for (int i = 0; i < static_cast<int>(produced.size()); ++i) {
      const int consumer = std::min(i, consumers - 1);
      uses.push_back({i, consumer});
      if (i != shortest || inherits) continue;
      for (int c = 0; c < consumers; ++c) {
        if (c != consumer) uses.push_back({i, c});
      }
    }
  }
  semu::Batch batch;
  batch.microbatches.push_back(std::move(microbatch));
  return batch;
}

}  // namespace

std::vector<int64_t> MostPaddedItems(int64_t tokens, int64_t items,
                                     int64_t longest,
                                     absl::Span<const int64_t> buckets) {
  // Each item is as short as its bucket allows. Were numbers of items
  // fractions, two buckets would be enough, either one with as many items as
  // can be, or such that tokens and items are both used up; what tokens are
  // left then lift single items into larger buckets.
  struct Bucket {
    int64_t least;  // tokens of an item that is padded to it
    int64_t padded;
  };
  std::vector<Bucket> all;
  for (size_t b = 0; b < buckets.size(); ++b) {
    const int64_t least = b == 0 ? 1 : buckets[b - 1] + 1;
    if (least <= longest) all.push_back({least, buckets[b]});
  }
  // What `count` items of a larger bucket and all that can be of a smaller one
  // are padded to; their lengths go to `found`, if that is not null.
  const auto padded_of = [&](size_t larger, int64_t count, size_t smaller,
                             std::vector<int64_t>* found) {
    const int64_t least = all[smaller].least;
    int64_t left = tokens - count * all[larger].least;
    int64_t rest = std::min(items - count, left / least);
    left -= rest * least;
    int64_t padded = count * all[larger].padded;
    if (found != nullptr) found->assign(count, all[larger].least);
    for (; rest > 0 && smaller + 1 < all.size() &&
           all[smaller + 1].least - least <= left;
         --rest) {
      size_t b = smaller + 1;
      while (b + 1 < all.size() && all[b + 1].least - least <= left) ++b;
      left -= all[b].least - least;
      padded += all[b].padded;
      if (found != nullptr) found->push_back(all[b].least);
    }
    if (found != nullptr) found->insert(found->end(), rest, least);
    return padded + rest * all[smaller].padded;
  };
  std::vector<int64_t> best;
  int64_t best_padded = 0;
  for (size_t larger = 0; larger < all.size(); ++larger) {
    const int64_t most = std::min(items, tokens / all[larger].least);
    for (size_t smaller = 0; smaller <= larger; ++smaller) {
      const int64_t lift = all[larger].least - all[smaller].least;
      const int64_t both =
          lift == 0 ? most
                    : (tokens - std::min(items, tokens / all[smaller].least) *
                                    all[smaller].least) /
                          lift;
      for (const int64_t count : {std::min(both, most), most}) {
        const int64_t padded = padded_of(larger, count, smaller, nullptr);
        if (padded <= best_padded) continue;
        best_padded = padded;
        padded_of(larger, count, smaller, &best);
      }
    }
  }
  // The rest fills items up, so that these are not taken together.
  int64_t left = tokens - std::accumulate(best.begin(), best.end(), int64_t{0});
  for (int64_t& item : best) {
    const int64_t bucket =
        *std::lower_bound(buckets.begin(), buckets.end(), item);
    const int64_t more = std::min(left, std::min(bucket, longest) - item);
    item += more;
    left -= more;
  }
  return best;
}

std::vector<HeavyBatch> HeaviestBatches(const Job& job,
                                        const semu::Layout& layout) {
  const auto longest = [&](int m) {
    return 2 * layout.modules[m].sub_microbatch_tokens;
  };
  std::vector<HeavyBatch> batches;
  const std::vector<int64_t>& buckets = job.executor.shape_buckets;
  if (buckets.empty()) {
    batches.push_back({BatchOf(job,
                               [&](int m, int64_t tokens) {
                                 return EqualItems(tokens, longest(m));
                               }),
                       "in items of twice sub_microbatch_tokens"});
    return batches;
  }
  const int64_t largest = buckets.back();
  const auto few = [&](int m, int64_t tokens) {
    return EqualItems(tokens, std::min(longest(m), largest));
  };
  batches.push_back({BatchOf(job, few), "in as few items as can be"});
  const auto sub_microbatch = [&](int m) {
    return std::min(layout.modules[m].sub_microbatch_tokens, largest);
  };
  std::map<int, std::vector<int64_t>> known;  // by module
  const auto padded = [&](int m, int64_t tokens) {
    const auto [it, is_new] = known.try_emplace(m);
    if (is_new) {
      it->second = MostPaddedItems(tokens,
                                   std::min(CeilDiv(tokens, sub_microbatch(m)),
                                            semu::kMostBucketsFilled),
                                   longest(m), buckets);
    }
    return it->second;
  };
  batches.push_back(
      {BatchOf(job, padded), "in items that are padded the most"});
  batches.push_back({BatchOf(job,
                             [&](int m, int64_t tokens) {
                               return EqualItems(tokens, sub_microbatch(m));
                             }),
                     "in items of sub_microbatch_tokens"});
  batches.push_back({BatchOf(job,
                             [&](int m, int64_t tokens) {
                               return EqualItems(
                                   tokens,
                                   std::min(longest(m), largest / 2 + 1));
                             }),
                     "in items of half of the largest of shape_buckets"});
  for (int long_items = 0; long_items < static_cast<int>(job.modules.size());
       ++long_items) {
    if (semu::InheritedEdge(job, long_items) >= 0) continue;
    batches.push_back(
        {BatchOf(job,
                 [&](int m, int64_t tokens) {
                   return m == long_items ? few(m, tokens) : padded(m, tokens);
                 }),
         absl::StrCat("in items that are padded the most, but in few of module "
                      "\"",
                      job.modules[long_items].name, "\",")});
  }
  return batches;
}

}  // namespace pipeweaver::search
