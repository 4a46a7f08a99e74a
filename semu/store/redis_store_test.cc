// Against a real redis-server; skipped, saying so, where none is installed.

#include "semu/store/redis_store.h"

#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "semu/store/record.h"
#include "semu/store/testing/numbered_entries.h"

namespace pipeweaver::semu {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

constexpr char kServer[] = "/usr/bin/redis-server";

// A redis-server on a socket of its own, nothing on disk.
class Redis {
 public:
  explicit Redis(const std::string& path) : path_(path) { Start(); }
  ~Redis() { Kill(); }

  void Start() {
    child_ = fork();
    if (child_ == 0) {
      if (freopen("/dev/null", "w", stdout) == nullptr) _exit(2);
      execl(kServer, kServer, "--port", "0", "--unixsocket", path_.c_str(),
            "--save", "", "--appendonly", "no", nullptr);
      _exit(2);
    }
    redisContext* context = nullptr;
    for (int i = 0; i < 10'000; ++i) {
      context = redisConnectUnix(path_.c_str());
      if (context != nullptr && context->err == 0) break;
      redisFree(context);
      context = nullptr;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ASSERT_NE(context, nullptr) << "redis-server does not start";
    redisFree(context);
  }
  void Kill() {
    if (child_ == 0) return;
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
    child_ = 0;
  }

 private:
  const std::string path_;
  pid_t child_ = 0;
};

class RedisStoreTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (access(kServer, X_OK) != 0) {
      GTEST_SKIP() << kServer << " is not installed (package redis-server)";
    }
    // Short: a socket's path has at most 107 bytes.
    path_ = absl::StrCat(
        "/tmp/pw-redis-", static_cast<int64_t>(getpid()), "-",
        ::testing::UnitTest::GetInstance()->current_test_info()->line());
  }
  void TearDown() override { unlink(path_.c_str()); }

  std::unique_ptr<RedisStore> Open(const std::string& address) {
    RedisOptions options;
    // The test decides when a pause is over.
    options.now = [this] {
      return std::chrono::steady_clock::time_point() + now_.load();
    };
    // A loaded machine is slow, not lost.
    options.answer_timeout = std::chrono::seconds(5);
    return *RedisStore::Create(address, options, [this](auto line) {
      MutexLock lock(&mutex_);
      log_.emplace_back(line);
    });
  }
  // Connected.
  std::unique_ptr<RedisStore> Open() {
    auto store = Open("unix:" + path_);
    EXPECT_TRUE(store->Ping());
    return store;
  }
  std::vector<std::string> log() {
    MutexLock lock(&mutex_);
    return log_;
  }

  std::string path_;
  std::atomic<std::chrono::seconds> now_ = std::chrono::seconds(0);
  Mutex mutex_;
  std::vector<std::string> log_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(RedisStoreTest, IsShared) {
  Redis redis(path_);
  const auto one = Open();
  const auto two = Open();
  EXPECT_EQ(one->Get("key"), std::nullopt);
  std::vector<StoreEntry> entries;
  entries.reserve(1000);
  for (int i = 0; i < 1000; ++i) {
    entries.push_back(NumberedEntry(0, i / kNumberedBatch, i % kNumberedBatch));
  }
  one->Put(entries);
  for (const StoreEntry& entry : entries) {
    EXPECT_EQ(two->Get(entry.key), entry.value);
  }
  EXPECT_EQ(two->Get("another"), std::nullopt);

  std::vector<absl::string_view> keys = {"another"};
  for (const StoreEntry& entry : entries) keys.push_back(entry.key);
  const auto values = two->GetAll(keys);
  ASSERT_EQ(values.size(), keys.size());
  EXPECT_EQ(values[0], std::nullopt);
  for (size_t i = 0; i < entries.size(); ++i) {
    EXPECT_EQ(values[i + 1], entries[i].value);
  }
  EXPECT_THAT(log(), IsEmpty());
}

TEST_F(RedisStoreTest, OneThatRefusesWritesStillAnswers) {
  Redis redis(path_);
  const auto store = Open();
  store->Put({{"key", "value"}});
  const auto set_memory = [&](const char* bytes) {
    redisContext* const context = redisConnectUnix(path_.c_str());
    ASSERT_NE(context, nullptr);
    void* const reply = redisCommand(context, "CONFIG SET maxmemory %s", bytes);
    ASSERT_NE(reply, nullptr);
    freeReplyObject(reply);
    redisFree(context);
  };
  set_memory("1");
  for (int i = 0; i < 3; ++i) {
    store->Put({{"other", "value"}});
    EXPECT_EQ(store->Get("key"), "value");
  }
  EXPECT_EQ(store->Get("other"), std::nullopt);
  EXPECT_THAT(log(), ElementsAre(HasSubstr("takes no new costs: OOM")));
  set_memory("0");
  store->Put({{"other", "value"}});
  EXPECT_EQ(store->Get("other"), "value");
  EXPECT_THAT(log(), ElementsAre(HasSubstr("takes no new costs"),
                                 HasSubstr("takes new costs again")));
}

TEST_F(RedisStoreTest, LossIsAMissAndHavingItBackIsNoticed) {
  Redis redis(path_);
  const auto store = Open();
  store->Put({{"key", "value"}});
  EXPECT_EQ(store->Get("key"), "value");
  EXPECT_TRUE(store->Ping());
  redis.Kill();
  EXPECT_EQ(store->Get("key"), std::nullopt);
  EXPECT_FALSE(store->Ping());
  EXPECT_THAT(log(), ElementsAre(HasSubstr("is lost, going on without it")));
  EXPECT_THAT(store->GetAll({"key", "other"}),
              ElementsAre(std::nullopt, std::nullopt));
  redis.Start();
  // Within the pause it is not even asked.
  store->Put({{"key", "value"}});
  EXPECT_EQ(store->Get("key"), std::nullopt);
  EXPECT_FALSE(store->Ping());
  now_ = std::chrono::seconds(2);
  EXPECT_TRUE(store->Ping());
  store->Put({{"key", "value"}});
  EXPECT_EQ(store->Get("key"), "value");
  EXPECT_THAT(log(), ElementsAre(HasSubstr("is lost"), HasSubstr("is back")));
}

TEST_F(RedisStoreTest, KilledUnderLoadNoWrongValueComesBack) {
  Redis redis(path_);
  const auto store = Open();
  std::atomic<bool> ending = false;
  std::atomic<int> asked = 0;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  threads.reserve(3);
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = t; !ending; i = (i + 1) % 500) {
        const StoreEntry entry = NumberedEntry(0, i, i % kNumberedBatch);
        const auto value = store->Get(entry.key);
        if (value && *value != entry.value) ++wrong;
        if (!value) store->Put({entry});
        ++asked;
      }
    });
  }
  for (int kills = 0; kills < 5; ++kills) {
    const int before = asked;
    while (asked < before + 200) std::this_thread::yield();
    redis.Kill();
    const int lost = asked;
    while (asked < lost + 200) std::this_thread::yield();
    redis.Start();
    now_ = now_.load() + std::chrono::seconds(60);
  }
  ending = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GE(log().size(), 5u);
}

TEST_F(RedisStoreTest, WhatOthersWroteThereIsAMiss) {
  Redis redis(path_);
  redisContext* raw = redisConnectUnix(path_.c_str());
  const std::string name = "pipeweaver:subgraph:1:" + RecordName("key");
  for (const std::string& bytes :
       {std::string("something else"), EncodeRecord("other key", "value"),
        EncodeRecord("key", "value") + "!", std::string()}) {
    freeReplyObject(redisCommand(raw, "SET %b %b", name.data(), name.size(),
                                 bytes.data(), bytes.size()));
    EXPECT_EQ(Open()->Get("key"), std::nullopt);
  }
  freeReplyObject(redisCommand(raw, "DEL %b", name.data(), name.size()));
  freeReplyObject(
      redisCommand(raw, "LPUSH %b value", name.data(), name.size()));
  EXPECT_EQ(Open()->Get("key"), std::nullopt);
  redisFree(raw);
}

TEST(RedisAddressTest, SaysWhatAnAddressMustBe) {
  for (const char* address : {"", "host", "host:", "host:0", "host:65536",
                              ":6379", "unix:", "host:port"}) {
    const auto store =
        RedisStore::Create(address, {}, [](absl::string_view) {});
    EXPECT_EQ(store.status().code(), absl::StatusCode::kInvalidArgument)
        << address;
    EXPECT_THAT(std::string(store.status().message()),
                HasSubstr("must be host:port or unix:path"));
  }
}

TEST(RedisAddressTest, AnIpv6HostStandsInBrackets) {
  std::vector<std::string> log;
  const auto store = RedisStore::Create(
      "[::1]:1", {}, [&log](auto line) { log.emplace_back(line); });
  ASSERT_TRUE(store.ok()) << store.status();
  EXPECT_FALSE((*store)->Ping());
  EXPECT_THAT(log, ElementsAre(AllOf(HasSubstr("Redis ::1:1 is lost"),
                                     Not(HasSubstr("service not known")))));
}

// A server that takes connections, and answers what a test lets it.
class FakeServer {
 public:
  FakeServer() : listener_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    auto* const to = reinterpret_cast<sockaddr*>(&address);
    EXPECT_EQ(bind(listener_, to, sizeof address), 0);
    EXPECT_EQ(listen(listener_, 16), 0);
    getsockname(listener_, to, &length);
    port_ = ntohs(address.sin_port);
  }
  ~FakeServer() { close(listener_); }

  std::unique_ptr<RedisStore> Open(RedisOptions options) {
    return *RedisStore::Create(absl::StrCat("127.0.0.1:", port_),
                               std::move(options), [this](auto line) {
                                 MutexLock lock(&mutex_);
                                 log_.emplace_back(line);
                               });
  }
  // Waits for a connection and what is first sent on it.
  int AcceptAndRead() {
    const int peer = accept(listener_, nullptr, nullptr);
    Read(peer);
    return peer;
  }
  static void Read(int peer) {
    char bytes[1024];
    EXPECT_GT(read(peer, bytes, sizeof bytes), 0);
  }
  // Connections that were not accepted yet.
  int TakeConnections() {
    fcntl(listener_, F_SETFL, O_NONBLOCK);
    int count = 0;
    for (int peer = 0; (peer = accept(listener_, nullptr, nullptr)) >= 0;
         ++count) {
      close(peer);
    }
    return count;
  }
  std::vector<std::string> log() {
    MutexLock lock(&mutex_);
    return log_;
  }

 private:
  const int listener_;
  int port_ = 0;
  Mutex mutex_;
  std::vector<std::string> log_ ABSL_GUARDED_BY(mutex_);
};

TEST(RedisTimeoutTest, SilenceCostsOneTimeoutAPause) {
  FakeServer server;
  RedisOptions options;
  auto now = std::chrono::steady_clock::time_point();
  options.now = [&now] { return now; };
  const auto store = server.Open(options);
  const auto put = [&store] {
    for (int i = 0; i < 100; ++i) store->Put({{"key", "value"}});
  };
  put();
  now += options.first_pause;
  put();
  now += options.first_pause;  // the second pause is longer
  put();
  EXPECT_EQ(server.TakeConnections(), 2);
  EXPECT_EQ(server.log().size(), 1u);
}

TEST(RedisTimeoutTest, GetsDoNotConnect) {
  FakeServer server;
  const auto store = server.Open({});
  EXPECT_EQ(store->Get("key"), std::nullopt);
  EXPECT_THAT(store->GetAll({"key", "other"}),
              ElementsAre(std::nullopt, std::nullopt));
  EXPECT_EQ(server.TakeConnections(), 0);
  EXPECT_THAT(server.log(), IsEmpty());
}

TEST(RedisTimeoutTest, GetsDoNotWaitForOtherCallers) {
  FakeServer server;
  RedisOptions options;
  options.answer_timeout = std::chrono::hours(1);
  const auto store = server.Open(options);
  std::thread putter([&store] { store->Put({{"key", "value"}}); });
  const int peer = server.AcceptAndRead();
  EXPECT_EQ(store->Get("key"), std::nullopt);
  EXPECT_THAT(server.log(), IsEmpty()) << "the put still waits";
  close(peer);
  putter.join();
  EXPECT_THAT(server.log(), ElementsAre(HasSubstr("is lost")));
}

// Each byte comes in time, all of them never do.
TEST(RedisTimeoutTest, AnAnswerThatTricklesIsGivenUp) {
  FakeServer server;
  RedisOptions options;
  options.answer_timeout = std::chrono::milliseconds(200);
  const auto store = server.Open(options);
  std::thread trickle([&server] {
    const int peer = server.AcceptAndRead();
    EXPECT_EQ(write(peer, "+PONG\r\n", 7), 7);
    server.Read(peer);
    EXPECT_EQ(write(peer, "*1\r\n$1000000000\r\n", 17), 17);
    pollfd closed = {peer, POLLIN, 0};
    while (poll(&closed, 1, /*milliseconds=*/1) == 0) {
      if (send(peer, "x", 1, MSG_NOSIGNAL) != 1) break;
    }
    close(peer);
  });
  EXPECT_TRUE(store->Ping());
  EXPECT_EQ(store->Get("key"), std::nullopt);
  EXPECT_THAT(server.log(), ElementsAre(HasSubstr("it is too slow")));
  trickle.join();
}

}  // namespace
}  // namespace pipeweaver::semu
