// A store that servers share: a Redis.

#ifndef SEMU_STORE_REDIS_STORE_H_
#define SEMU_STORE_REDIS_STORE_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "semu/base/mutex.h"
#include "semu/store/subgraph_store.h"

struct redisContext;
struct redisReply;

namespace pipeweaver::semu {

struct RedisOptions {
  // Most time to connect once the host's name is resolved.
  std::chrono::milliseconds connect_timeout{50};
  // Most time to wait for the answers to a get or a ping, and for each one to a
  // put.
  std::chrono::milliseconds answer_timeout{20};
  // After a failure nothing is asked for this long, twice as long after each
  // further one, up to `longest_pause`.
  std::chrono::milliseconds first_pause{1000};
  std::chrono::milliseconds longest_pause{30'000};
  // After which Redis forgets an entry.
  std::chrono::seconds time_to_live{30 * 24 * 3600};
  std::function<std::chrono::steady_clock::time_point()> now =
      std::chrono::steady_clock::now;
};

// Records (record.h) under "pipeweaver:subgraph:1:" and their names. One
// connection, which puts and pings make: gets never connect, and where there is
// no connection, or another caller has it, all is a miss at once. So a Redis
// that is away, slow or wrong costs gets at most two answer timeouts a pause,
// the second for what is under way at the first's end. Puts may take as long as
// resolving a name does: they belong behind the callers (write_behind_store.h).
// Losing Redis and having it back is logged. Thread-safe.
//
// What sharing is good for: a get costs a round trip, about 20 us on one
// machine and more between two, a layer asked for with others 4 us, which is
// what simulating it by the device's own rules takes, too. So a server that
// finds the layers of its first step here saves little or nothing; it is dearer
// rules (cost/op_time.h) that are worth sharing. Neither costs anything once a
// server is warm: its memory answers first.
class RedisStore : public SubgraphStore {
 public:
  using Log = std::function<void(absl::string_view)>;

  // `address`: host:port, an IPv6 host in brackets, or unix:path. Errors:
  // INVALID_ARGUMENT for any other.
  static absl::StatusOr<std::unique_ptr<RedisStore>> Create(
      absl::string_view address, RedisOptions options, Log log);

  ~RedisStore() override;
  RedisStore(const RedisStore&) = delete;
  RedisStore& operator=(const RedisStore&) = delete;

  absl::string_view name() const override { return "redis"; }
  std::optional<std::string> Get(absl::string_view key) override;
  std::vector<std::optional<std::string>> GetAll(
      absl::Span<const absl::string_view> keys) override;
  void Put(absl::Span<const StoreEntry> entries) override;

  // Whether Redis answers; false, and it is not asked, within a pause. Connects
  // where there is no connection, and waits for other callers.
  bool Ping();

 private:
  struct FreeReply {
    void operator()(redisReply* reply) const;
  };
  using Reply = std::unique_ptr<redisReply, FreeReply>;

  RedisStore(std::string host, int port, RedisOptions options, Log log);

  // The answers to `commands`, sent together; none, and the connection is given
  // up, where one is an error other than a refusal to write, or more is to be
  // read or sent at `deadline`. REQUIRES: connected.
  std::vector<Reply> Ask(absl::Span<const std::string> commands,
                         std::chrono::steady_clock::time_point deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Sends all, or gives the connection up.
  bool Send(absl::Span<const std::string> commands,
            std::chrono::steady_clock::time_point deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The next answer; null where the connection is given up.
  Reply Receive(std::chrono::steady_clock::time_point deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Connects where there is no connection and the pause is over; whether there
  // is one.
  bool Connect() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Gives the connection up for a while.
  void Fail(absl::string_view reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Succeed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Logs it where Redis begins to refuse writes, or takes them again; `refusal`
  // is empty where it took the last.
  void NoteWrites(absl::string_view refusal)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string host_;
  const int port_;  // -1: host_ is a socket's path
  const RedisOptions options_;
  const Log log_;

  Mutex mutex_;
  redisContext* context_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::chrono::milliseconds pause_ ABSL_GUARDED_BY(mutex_){0};  // 0: it is well
  std::chrono::steady_clock::time_point retry_at_ ABSL_GUARDED_BY(mutex_);
  bool writes_ ABSL_GUARDED_BY(mutex_) = true;  // Redis took the last write
};

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_REDIS_STORE_H_
