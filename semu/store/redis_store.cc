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

using std::chrono::steady_clock;

constexpr absl::string_view kPrefix = "pipeweaver:subgraph:1:";
// Keys of one command to get, commands to put sent before their answers are
// read.
constexpr size_t kMaxBatch = 256;
constexpr absl::string_view kTooSlow = "it is too slow";

// A command in Redis's protocol: the number of its arguments, then each with
// its length.
std::string Command(absl::Span<const std::string> arguments) {
  std::string command = absl::StrCat("*", arguments.size(), "\r\n");
  for (const std::string& argument : arguments) {
    absl::StrAppend(&command, "$", argument.size(), "\r\n", argument, "\r\n");
  }
  return command;
}

std::vector<std::string> GetCommands(absl::Span<const absl::string_view> keys) {
  std::vector<std::string> commands;
  for (; !keys.empty(); keys.remove_prefix(std::min(kMaxBatch, keys.size()))) {
    std::vector<std::string> arguments = {"MGET"};
    for (const absl::string_view key : keys.subspan(0, kMaxBatch)) {
      arguments.push_back(absl::StrCat(kPrefix, RecordName(key)));
    }
    commands.push_back(Command(arguments));
  }
  return commands;
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

// A Redis that is full, a replica, or cannot save refuses writes and still
// answers reads.
bool IsRefusal(const redisReply& error) {
  const absl::string_view text(error.str, error.len);
  return absl::StartsWith(text, "OOM ") ||
         absl::StartsWith(text, "READONLY ") ||
         absl::StartsWith(text, "MISCONF ");
}

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

bool RedisStore::Connect() {
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

bool RedisStore::Ping() {
  MutexLock lock(&mutex_);
  const SigpipeBlock no_signal;
  return Connect() && !Ask({Command({"PING"})},
                           steady_clock::now() + options_.answer_timeout)
                           .empty();
}

std::optional<std::string> RedisStore::Get(absl::string_view key) {
  return GetAll({key})[0];
}

std::vector<std::optional<std::string>> RedisStore::GetAll(
    absl::Span<const absl::string_view> keys) {
  std::vector<std::optional<std::string>> values(keys.size());
  if (!mutex_.TryLock()) return values;
  std::vector<Reply> replies;
  if (context_ != nullptr) {
    const SigpipeBlock no_signal;
    replies =
        Ask(GetCommands(keys), steady_clock::now() + options_.answer_timeout);
  }
  mutex_.Unlock();
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
    MutexLock lock(&mutex_);
    const SigpipeBlock no_signal;
    if (!Connect()) return;
    const std::vector<Reply> replies =
        Ask(commands, steady_clock::time_point::max());
    if (replies.empty()) return;
    const auto refusal = std::find_if(
        replies.begin(), replies.end(),
        [](const Reply& reply) { return reply->type == REDIS_REPLY_ERROR; });
    NoteWrites(refusal == replies.end()
                   ? absl::string_view()
                   : absl::string_view((*refusal)->str, (*refusal)->len));
    if (!writes_) return;
  }
}

void RedisStore::NoteWrites(absl::string_view refusal) {
  if (refusal.empty() == writes_) return;
  writes_ = refusal.empty();
  log_(absl::StrCat(
      "subgraph store at Redis ", host_,
      port_ < 0 ? "" : absl::StrCat(":", port_),
      writes_ ? " takes new costs again" : " takes no new costs: ", refusal));
}

std::vector<RedisStore::Reply> RedisStore::Ask(
    absl::Span<const std::string> commands, steady_clock::time_point deadline) {
  if (!Send(commands, deadline)) return {};
  std::vector<Reply> replies;
  while (replies.size() < commands.size()) {
    replies.push_back(Receive(deadline));
    const Reply& reply = replies.back();
    if (reply == nullptr) return {};
    if (reply->type == REDIS_REPLY_ERROR && !IsRefusal(*reply)) {
      Fail(absl::string_view(reply->str, reply->len));
      return {};
    }
  }
  Succeed();
  return replies;
}

bool RedisStore::Send(absl::Span<const std::string> commands,
                      steady_clock::time_point deadline) {
  for (const std::string& command : commands) {
    redisAppendFormattedCommand(context_, command.data(), command.size());
  }
  int done = 0;
  while (redisBufferWrite(context_, &done) == REDIS_OK) {
    if (done) return true;
    if (steady_clock::now() >= deadline) {
      Fail(kTooSlow);
      return false;
    }
  }
  Fail(context_->errstr);
  return false;
}

RedisStore::Reply RedisStore::Receive(steady_clock::time_point deadline) {
  void* answer = nullptr;
  while (redisGetReplyFromReader(context_, &answer) == REDIS_OK) {
    if (answer != nullptr) return Reply(static_cast<redisReply*>(answer));
    if (steady_clock::now() >= deadline) {
      Fail(kTooSlow);
      return nullptr;
    }
    if (redisBufferRead(context_) != REDIS_OK) break;
  }
  Fail(context_->errstr);
  return nullptr;
}

}  // namespace pipeweaver::semu
