#include "semu/store/redis_store.h"

#include <hiredis/hiredis.h>
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <time.h>

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "semu/store/record.h"

namespace pipeweaver::semu {
namespace {

constexpr absl::string_view kPrefix = "pipeweaver:subgraph:1:";
// Commands sent before their answers are read.
constexpr size_t kMaxBatch = 256;

struct FreeReply {
  void operator()(redisReply* reply) const { freeReplyObject(reply); }
};
using Reply = std::unique_ptr<redisReply, FreeReply>;

timeval TimevalOf(std::chrono::milliseconds time) {
  return {static_cast<time_t>(time.count() / 1000),
          static_cast<suseconds_t>(time.count() % 1000 * 1000)};
}

// hiredis writes to its socket without MSG_NOSIGNAL: while this lives, a closed
// connection is an error of the call and no signal to the process.
class SigpipeBlock {
 public:
  SigpipeBlock() {
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    sigemptyset(&sigpipe_);
    sigaddset(&sigpipe_, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &sigpipe_, &before_);
  }
  ~SigpipeBlock() {
    if (!was_pending_) {
      const timespec none = {0, 0};
      while (sigtimedwait(&sigpipe_, nullptr, &none) >= 0) {
      }
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  SigpipeBlock(const SigpipeBlock&) = delete;
  SigpipeBlock& operator=(const SigpipeBlock&) = delete;

 private:
  sigset_t sigpipe_;
  sigset_t before_;
  bool was_pending_ = false;
};

}  // namespace

RedisStore::RedisStore(std::string host, int port, RedisOptions options,
                       Log log)
    : host_(std::move(host)),
      port_(port),
      options_(std::move(options)),
      log_(std::move(log)) {}

RedisStore::~RedisStore() {
  MutexLock lock(&mutex_);
  if (context_ != nullptr) redisFree(context_);
}

absl::StatusOr<std::unique_ptr<RedisStore>> RedisStore::Create(
    absl::string_view address, RedisOptions options, Log log) {
  std::string host;
  int port = -1;
  if (absl::StartsWith(address, "unix:")) {
    host = std::string(address.substr(5));
  } else if (const size_t colon = address.rfind(':');
             colon != absl::string_view::npos &&
             absl::SimpleAtoi(address.substr(colon + 1), &port) && port >= 1 &&
             port <= 65535) {
    host = std::string(address.substr(0, colon));
  }
  if (host.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", address, "', must be host:port or unix:path"));
  }
  return std::unique_ptr<RedisStore>(new RedisStore(
      std::move(host), port, std::move(options), std::move(log)));
}

bool RedisStore::Connected() {
  if (context_ != nullptr) return true;
  if (pause_.count() > 0 && options_.now() < retry_at_) return false;
  const timeval timeout = TimevalOf(options_.connect_timeout);
  context_ = port_ < 0 ? redisConnectUnixWithTimeout(host_.c_str(), timeout)
                       : redisConnectWithTimeout(host_.c_str(), port_, timeout);
  if (context_ == nullptr || context_->err != 0) {
    Fail(context_ == nullptr ? "no memory" : context_->errstr);
    return false;
  }
  redisSetTimeout(context_, TimevalOf(options_.answer_timeout));
  return true;
}

void RedisStore::Fail(absl::string_view reason) {
  if (pause_.count() == 0) {
    log_(absl::StrCat("subgraph store at Redis ", host_,
                      port_ < 0 ? "" : absl::StrCat(":", port_),
                      " is lost, going on without it: ", reason));
  }
  if (context_ != nullptr) redisFree(context_);
  context_ = nullptr;
  pause_ = pause_.count() == 0 ? options_.first_pause
                               : std::min(2 * pause_, options_.longest_pause);
  retry_at_ = options_.now() + pause_;
}

void RedisStore::Succeed() {
  if (pause_.count() == 0) return;
  pause_ = std::chrono::milliseconds(0);
  log_(absl::StrCat("subgraph store at Redis ", host_,
                    port_ < 0 ? "" : absl::StrCat(":", port_), " is back"));
}

std::optional<std::string> RedisStore::Get(absl::string_view key) {
  const std::string name = absl::StrCat(kPrefix, RecordName(key));
  MutexLock lock(&mutex_);
  const SigpipeBlock no_signal;
  if (!Connected()) return std::nullopt;
  const Reply reply(static_cast<redisReply*>(
      redisCommand(context_, "GET %b", name.data(), name.size())));
  if (reply == nullptr) {
    Fail(context_->errstr);
    return std::nullopt;
  }
  if (reply->type == REDIS_REPLY_ERROR) {
    Fail(absl::string_view(reply->str, reply->len));
    return std::nullopt;
  }
  Succeed();
  if (reply->type != REDIS_REPLY_STRING) return std::nullopt;
  return DecodeRecord(key, absl::string_view(reply->str, reply->len));
}

void RedisStore::Put(absl::Span<const StoreEntry> entries) {
  while (!entries.empty()) {
    const absl::Span<const StoreEntry> batch = entries.subspan(0, kMaxBatch);
    entries.remove_prefix(batch.size());
    MutexLock lock(&mutex_);
    const SigpipeBlock no_signal;
    if (!Connected()) return;
    for (const StoreEntry& entry : batch) {
      const std::string name = absl::StrCat(kPrefix, RecordName(entry.key));
      const std::string record = EncodeRecord(entry.key, entry.value);
      redisAppendCommand(context_, "SET %b %b EX %lld", name.data(),
                         name.size(), record.data(), record.size(),
                         static_cast<long long>(options_.time_to_live.count()));
    }
    for (size_t i = 0; i < batch.size(); ++i) {
      void* answer = nullptr;
      if (redisGetReply(context_, &answer) != REDIS_OK) {
        Fail(context_->errstr);
        return;
      }
      const Reply reply(static_cast<redisReply*>(answer));
      if (reply->type == REDIS_REPLY_ERROR) {
        Fail(absl::string_view(reply->str, reply->len));
        return;
      }
    }
    Succeed();
  }
}

}  // namespace pipeweaver::semu
