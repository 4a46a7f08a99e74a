// Two figures of the server, measured through real gRPC on loopback, server and
// clients in one process on the same cores.
//
//   bazel run //server/bench:serve_benchmark -- [--setup=vlm-s]
//       [--microbatches=64] [--steps=100] [--runs=5] [--search_budget_ms=50]
//       [--round_ms=300] [--rounds=15]
//
// 1. From submitting a step until the last rank holds its verified program: p50
//    and p99 over the steps, and the same less the search itself. All runs plan
//    the same steps, each run on a new server: the least that a step took in
//    any run leaves out most of what other work on the machine cost it.
// 2. Sealed programs a second, beside an echo of equal answers that does
//    nothing else, in alternating rounds; medians and their ratio. Fails (exit
//    code 1) below 80 % of the echo.

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/reflection.h"
#include "absl/strings/str_cat.h"
#include "client_agents/cc/planner_client.h"
#include "search/planner.h"
#include "semu/base/check.h"
#include "semu/base/mutex.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"
#include "server/clock.h"
#include "server/config.h"
#include "server/server.h"

ABSL_FLAG(std::string, setup, "vlm-s", "job to plan");
ABSL_FLAG(int, microbatches, 64, "microbatches of a step");
ABSL_FLAG(int, steps, 100, "steps to plan");
ABSL_FLAG(int, runs, 5, "times that they are planned");
ABSL_FLAG(int, search_budget_ms, 50, "time of each search");
ABSL_FLAG(int, round_ms, 300, "length of a round of reads");
ABSL_FLAG(int, rounds, 15, "rounds of each kind");

namespace pipeweaver::server {
namespace {

using BenchClock = std::chrono::steady_clock;

double Milliseconds(BenchClock::duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * (values.size() - 1) + 0.5)];
}

// Answers every call with the same bytes.
class Echo final : public grpc::CallbackGenericService {
 public:
  explicit Echo(size_t bytes) : bytes_(bytes, 'x') {}

 private:
  class Reactor final : public grpc::ServerGenericBidiReactor {
   public:
    explicit Reactor(const std::string& bytes) : bytes_(bytes) {
      StartRead(&request_);
    }
    void OnReadDone(bool ok) override {
      if (!ok) {
        Finish(grpc::Status::CANCELLED);
        return;
      }
      const grpc::Slice slice(bytes_.data(), bytes_.size(),
                              grpc::Slice::STATIC_SLICE);
      response_ = grpc::ByteBuffer(&slice, 1);
      StartWriteAndFinish(&response_, grpc::WriteOptions(), grpc::Status::OK);
    }
    void OnDone() override { delete this; }

   private:
    const std::string& bytes_;
    grpc::ByteBuffer request_;
    grpc::ByteBuffer response_;
  };

  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext*) override {
    return new Reactor(bytes_);
  }

  const std::string bytes_;
};

double CpuSeconds() {
  rusage usage;
  PW_CHECK(getrusage(RUSAGE_SELF, &usage) == 0);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) *
             1e-6;
}

struct Rates {
  double calls_per_second = 0;
  double cpu_us_per_call = 0;
};

// Keeps `concurrency` calls in flight for `length`.
Rates Measure(grpc::GenericStub& stub, const std::string& method,
              const std::string& request_bytes, int concurrency,
              BenchClock::duration length) {
  Mutex mutex;
  CondVar changed;
  int running = concurrency;
  std::atomic<int64_t> calls = 0;
  const double cpu_start = CpuSeconds();
  const BenchClock::time_point start = BenchClock::now();
  const BenchClock::time_point end = start + length;
  struct Slot {
    std::unique_ptr<grpc::ClientContext> context;
    grpc::ByteBuffer request;
    grpc::ByteBuffer response;
    std::function<void()> next;
  };
  std::vector<Slot> slots(concurrency);
  for (Slot& slot : slots) {
    const grpc::Slice slice(request_bytes);
    slot.request = grpc::ByteBuffer(&slice, 1);
    slot.next = [&] {
      slot.context = std::make_unique<grpc::ClientContext>();
      slot.response.Clear();
      stub.UnaryCall(slot.context.get(), method, grpc::StubOptions(),
                     &slot.request, &slot.response,
                     [&](const grpc::Status& status) {
                       PW_CHECK(status.ok());
                       ++calls;
                       if (BenchClock::now() < end) {
                         slot.next();
                         return;
                       }
                       MutexLock lock(&mutex);
                       --running;
                       changed.NotifyAll();
                     });
    };
    slot.next();
  }
  {
    MutexLock lock(&mutex);
    while (running > 0) changed.Wait(&mutex);
  }
  const double count = static_cast<double>(calls);
  return {
      count / std::chrono::duration<double>(BenchClock::now() - start).count(),
      (CpuSeconds() - cpu_start) * 1e6 / count};
}

// A rank that fetches its program of one step after the other.
class Rank {
 public:
  Rank(client::PlannerClient client, int rank)
      : client_(std::move(client)), rank_(rank), thread_([this] { Serve(); }) {}
  ~Rank() {
    {
      MutexLock lock(&mutex_);
      state_ = State::kEnding;
    }
    changed_.NotifyAll();
    thread_.join();
  }

  void Fetch(const v1::PlanKey& key) {
    {
      MutexLock lock(&mutex_);
      key_ = key;
      state_ = State::kFetching;
    }
    changed_.NotifyAll();
  }

  // When it held what it was last told to fetch; waits until it does.
  BenchClock::time_point Held() {
    MutexLock lock(&mutex_);
    while (state_ == State::kFetching) changed_.Wait(&mutex_);
    return held_;
  }

 private:
  enum class State { kIdle, kFetching, kEnding };

  void Serve() {
    MutexLock lock(&mutex_);
    while (true) {
      while (state_ == State::kIdle) changed_.Wait(&mutex_);
      if (state_ == State::kEnding) return;
      const v1::PlanKey key = key_;
      mutex_.Unlock();
      PW_CHECK(client_.GetProgram(key, rank_).ok());
      const BenchClock::time_point now = BenchClock::now();
      mutex_.Lock();
      held_ = now;
      state_ = State::kIdle;
      changed_.NotifyAll();
    }
  }

  client::PlannerClient client_;
  const int rank_;
  Mutex mutex_;
  CondVar changed_;
  State state_ ABSL_GUARDED_BY(mutex_) = State::kIdle;
  v1::PlanKey key_ ABSL_GUARDED_BY(mutex_);
  BenchClock::time_point held_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

// What a step took, in milliseconds.
struct StepLatency {
  double total = 0;  // from submitting it to the last rank's program
  double less_search = 0;
  double to_seal = 0;  // part of less_search, as is `checks`
  double checks = 0;
};

using LatencyField = double StepLatency::*;

std::vector<double> Values(const std::vector<StepLatency>& steps,
                           LatencyField field) {
  std::vector<double> values;
  values.reserve(steps.size());
  for (const StepLatency& step : steps) values.push_back(step.*field);
  return values;
}

// Of all steps of all runs, and of each step's least. `runs`: [run][step].
void PrintLatency(const std::vector<std::vector<StepLatency>>& runs) {
  std::vector<StepLatency> all;
  std::vector<double> least = Values(runs[0], &StepLatency::less_search);
  for (const std::vector<StepLatency>& run : runs) {
    all.insert(all.end(), run.begin(), run.end());
    for (size_t step = 0; step < run.size(); ++step) {
      least[step] = std::min(least[step], run[step].less_search);
    }
  }
  const std::pair<std::string, std::vector<double>> rows[] = {
      {"submit to last rank's program", Values(all, &StepLatency::total)},
      {"the same less search", Values(all, &StepLatency::less_search)},
      {"of that up to the seal", Values(all, &StepLatency::to_seal)},
      {"of that the checkers", Values(all, &StepLatency::checks)},
      {absl::StrCat("less search, least of ", runs.size(), " runs"), least}};
  for (const auto& [name, values] : rows) {
    std::printf("  %-30s p50 %8.2f ms   p99 %8.2f ms\n", name.c_str(),
                Quantile(values, 0.5), Quantile(values, 0.99));
  }
}

class Benchmark {
 public:
  Benchmark()
      : job_(*semu::MakeSetup(absl::GetFlag(FLAGS_setup))),
        planner_(search::MakeStepPlanner()) {
    v1::ServerConfig config;
    config.set_listen_address("127.0.0.1:0");
    config.set_metrics_address("none");
    config.set_search_budget_ms(absl::GetFlag(FLAGS_search_budget_ms));
    server_config_ = *CompleteConfig(config);
    server_ = *Server::Start(server_config_, planner_.get(), nullptr, &clock_);
    client::PlannerClient client = Connect();
    v1::RegisterJobRequest request;
    request.set_request_id("benchmark");
    *request.mutable_job() = job_;
    for (int i = 0; i < 6; ++i) {
      // Other batches than those that are planned.
      *request.add_sample_batches() = *semu::SampleBatch(
          job_, {.seed = static_cast<uint64_t>(1'000'000 + i),
                 .microbatches = absl::GetFlag(FLAGS_microbatches)});
    }
    const auto registered = client.RegisterJob(request);
    if (!registered.ok()) {
      std::fprintf(stderr, "%s\n", registered.status().ToString().c_str());
    }
    PW_CHECK(registered.ok());
    layout_digest_ = registered->layout_digest();
    v1::ConfirmLayoutRequest confirm;
    confirm.set_job(job_.name());
    confirm.set_attempt(registered->attempt());
    confirm.set_layout_digest(layout_digest_);
    PW_CHECK(client.ConfirmLayout(confirm).ok());
    key_.set_job(job_.name());
    key_.set_attempt(registered->attempt());
  }

  std::vector<StepLatency> Latency() {
    const int ranks = job_.parallelism().pipeline_parallel();
    client::PlannerClient submitter = Connect();
    std::vector<std::unique_ptr<Rank>> clients;
    for (int rank = 0; rank < ranks; ++rank) {
      client::PlannerClient client = Connect();
      PW_CHECK(client.ListJobs({}).ok());  // connects
      clients.push_back(std::make_unique<Rank>(std::move(client), rank));
    }
    std::vector<StepLatency> latencies;
    const int steps = absl::GetFlag(FLAGS_steps);
    // Until the server holds as many plans as it keeps, each takes new memory
    // from the kernel; these steps are left out.
    const int kept = server_config_.max_steps_per_replica();
    for (int step = 0; step < kept + steps; ++step) {
      key_.set_step(step);
      v1::SubmitStepRequest request;
      *request.mutable_key() = key_;
      request.set_layout_digest(layout_digest_);
      semu::SampleOptions options;
      options.seed = step;
      options.microbatches = absl::GetFlag(FLAGS_microbatches);
      *request.mutable_batch() = *semu::SampleBatch(job_, options);
      const BenchClock::time_point start = BenchClock::now();
      PW_CHECK(submitter.SubmitStep(request).ok());
      for (const auto& client : clients) client->Fetch(key_);
      BenchClock::time_point last = start;
      for (const auto& client : clients) last = std::max(last, client->Held());
      const auto plan = submitter.GetPlan(key_);
      PW_CHECK(plan.ok());
      if (step < kept) continue;
      const v1::PlanReport& report = plan->report();
      StepLatency& latency = latencies.emplace_back();
      latency.total = Milliseconds(last - start);
      latency.less_search = latency.total - report.search_ns() * 1e-6;
      latency.to_seal =
          (report.submit_to_seal_ns() - report.search_ns()) * 1e-6;
      latency.checks = report.check_ns() * 1e-6;
    }
    return latencies;
  }

  // Prints the second figure; false: below 80 %.
  bool Serving() {
    v1::GetProgramRequest request;
    *request.mutable_key() = key_;
    const std::string bytes = request.SerializeAsString();
    client::PlannerClient client = Connect();
    const size_t answer_bytes = client.GetProgram(key_, 0)->ByteSizeLong() + 16;
    Echo echo(answer_bytes);
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(),
                             &port);
    builder.RegisterCallbackGenericService(&echo);
    const auto echo_server = builder.BuildAndStart();
    const auto Stub = [](const std::string& address) {
      return grpc::GenericStub(
          grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
    };
    grpc::GenericStub server_stub = Stub(server_->address());
    grpc::GenericStub echo_stub = Stub("127.0.0.1:" + std::to_string(port));
    const std::string method = "/pipeweaver.v1.PlannerService/GetProgram";
    const auto length =
        std::chrono::milliseconds(absl::GetFlag(FLAGS_round_ms));
    bool enough = true;
    std::printf("sealed programs of %zu bytes against an echo\n", answer_bytes);
    for (const int concurrency : {1, 8}) {
      Measure(server_stub, method, bytes, concurrency, length / 4);
      Measure(echo_stub, method, bytes, concurrency, length / 4);
      std::vector<double> rate, echo_rate, ratio, cpu, echo_cpu, cpu_ratio;
      for (int round = 0; round < absl::GetFlag(FLAGS_rounds); ++round) {
        const Rates ours =
            Measure(server_stub, method, bytes, concurrency, length);
        const Rates bare =
            Measure(echo_stub, method, bytes, concurrency, length);
        rate.push_back(ours.calls_per_second);
        echo_rate.push_back(bare.calls_per_second);
        ratio.push_back(ours.calls_per_second / bare.calls_per_second);
        cpu.push_back(ours.cpu_us_per_call);
        echo_cpu.push_back(bare.cpu_us_per_call);
        cpu_ratio.push_back(bare.cpu_us_per_call / ours.cpu_us_per_call);
      }
      enough = enough && Quantile(cpu_ratio, 0.5) >= 0.8;
      std::printf(
          "  %d at once: %6.0f /s, echo %6.0f /s, ratio %.2f (%.2f .. %.2f); "
          "CPU %.0f us a call, echo %.0f, ratio %.2f (%.2f .. %.2f)\n",
          concurrency, Quantile(rate, 0.5), Quantile(echo_rate, 0.5),
          Quantile(ratio, 0.5), Quantile(ratio, 0), Quantile(ratio, 1),
          Quantile(cpu, 0.5), Quantile(echo_cpu, 0.5), Quantile(cpu_ratio, 0.5),
          Quantile(cpu_ratio, 0), Quantile(cpu_ratio, 1));
    }
    return enough;
  }

 private:
  client::PlannerClient Connect() {
    client::PlannerClientOptions options;
    options.call_timeout = std::chrono::seconds(60);
    return *client::PlannerClient::Create(server_->address(), options);
  }

  const v1::Job job_;
  const std::unique_ptr<search::StepPlanner> planner_;
  v1::ServerConfig server_config_;
  SteadyClock clock_;
  std::unique_ptr<Server> server_;
  std::string layout_digest_;
  v1::PlanKey key_;
};

}  // namespace
}  // namespace pipeweaver::server

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  for (const auto* flag :
       {&FLAGS_microbatches, &FLAGS_steps, &FLAGS_runs, &FLAGS_search_budget_ms,
        &FLAGS_round_ms, &FLAGS_rounds}) {
    const int value = absl::GetFlag(*flag);
    if (value >= 1) continue;
    std::fprintf(
        stderr, "--%s: %d, must be at least 1\n",
        std::string(absl::GetFlagReflectionHandle(*flag).Name()).c_str(),
        value);
    return 2;
  }
  const auto job = pipeweaver::semu::MakeSetup(absl::GetFlag(FLAGS_setup));
  if (!job.ok()) {
    std::fprintf(stderr, "--setup: %s\n",
                 std::string(job.status().message()).c_str());
    return 2;
  }
  std::unique_ptr<pipeweaver::server::Benchmark> benchmark;
  std::vector<std::vector<pipeweaver::server::StepLatency>> runs;
  for (int run = 0; run < absl::GetFlag(FLAGS_runs); ++run) {
    benchmark = std::make_unique<pipeweaver::server::Benchmark>();
    runs.push_back(benchmark->Latency());
  }
  std::printf("%s, %d microbatches, %d runs of %d steps, search budget %d ms\n",
              job->name().c_str(), absl::GetFlag(FLAGS_microbatches),
              absl::GetFlag(FLAGS_runs), absl::GetFlag(FLAGS_steps),
              absl::GetFlag(FLAGS_search_budget_ms));
  pipeweaver::server::PrintLatency(runs);
  return benchmark->Serving() ? 0 : 1;
}
