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
#include "absl/strings/strip.h"
#include "semu/store/record.h"

namespace pipeweaver::semu {
namespace {

constexpr absl::string_view kPrefix = "pipeweaver:subgraph:1:";
// Keys of one command to get, commands to put sent before their answers are
// read: what keeps another caller waiting is short.
constexpr size_t kMaxBatch = 256;

// A command in Redis's protocol: the number of its arguments, then each with
// its length.
std::string Command(absl::Span<const std::string> arguments) {
  std::string command = absl::StrCat("*", arguments.size(), "\r\n");
  for (const std::string& argument : arguments) {
    absl::StrAppend(&command, "$", argument.size(), "\r\n", argument, "\r\n");
  }
  return command;
}

std::string GetCommand(absl::Span<const absl::string_view> keys) {
  std::vector<std::string> arguments = {"MGET"};
  for (const absl::string_view key : keys) {
    arguments.push_back(absl::StrCat(kPrefix, RecordName(key)));
  }
  return Command(arguments);
}

std::string SetCommand(const StoreEntry& entry,
                       std::chrono::seconds time_to_live) {
  return Command({"SET", absl::StrCat(kPrefix, RecordName(entry.key)),
                  EncodeRecord(entry.key, entry.value), "EX",
                  absl::StrCat(time_to_live.count())});
}

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

void RedisStore::FreeReply::operator()(redisReply* reply) const {
  freeReplyObject(reply);
}

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
    absl::string_view name = address.substr(0, colon);
    if (absl::ConsumePrefix(&name, "[")) absl::ConsumeSuffix(&name, "]");
    host = std::string(name);
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

bool RedisStore::Ping() { return !Ask({Command({"PING"})}).empty(); }

std::optional<std::string> RedisStore::Get(absl::string_view key) {
  return GetAll({key})[0];
}

std::vector<std::optional<std::string>> RedisStore::GetAll(
    absl::Span<const absl::string_view> keys) {
  std::vector<std::optional<std::string>> values(keys.size());
  std::vector<std::string> commands;
  for (size_t i = 0; i < keys.size(); i += kMaxBatch) {
    commands.push_back(GetCommand(keys.subspan(i, kMaxBatch)));
  }
  const std::vector<Reply> replies = Ask(commands);
  for (size_t b = 0; b < replies.size(); ++b) {
    const redisReply& reply = *replies[b];
    const size_t first = b * kMaxBatch;
    const size_t asked = std::min(kMaxBatch, keys.size() - first);
    if (reply.type != REDIS_REPLY_ARRAY || reply.elements != asked) continue;
    for (size_t i = 0; i < asked; ++i) {
      const redisReply& record = *reply.element[i];
      if (record.type != REDIS_REPLY_STRING) continue;
      values[first + i] = DecodeRecord(
          keys[first + i], absl::string_view(record.str, record.len));
    }
  }
  return values;
}

void RedisStore::Put(absl::Span<const StoreEntry> entries) {
  while (!entries.empty()) {
    std::vector<std::string> commands;
    for (const StoreEntry& entry : entries.subspan(0, kMaxBatch)) {
      commands.push_back(SetCommand(entry, options_.time_to_live));
    }
    entries.remove_prefix(commands.size());
    if (Ask(commands).empty()) return;
  }
}

std::vector<RedisStore::Reply> RedisStore::Ask(
    absl::Span<const std::string> commands) {
  std::vector<Reply> replies;
  MutexLock lock(&mutex_);
  const SigpipeBlock no_signal;
  if (!Connected()) return {};
  for (const std::string& command : commands) {
    redisAppendFormattedCommand(context_, command.data(), command.size());
  }
  for (size_t i = 0; i < commands.size(); ++i) {
    void* answer = nullptr;
    if (redisGetReply(context_, &answer) != REDIS_OK) {
      Fail(context_->errstr);
      return {};
    }
    replies.emplace_back(static_cast<redisReply*>(answer));
    if (replies.back()->type == REDIS_REPLY_ERROR) {
      Fail(absl::string_view(replies.back()->str, replies.back()->len));
      return {};
    }
  }
  Succeed();
  return replies;
}

}  // namespace pipeweaver::semu
