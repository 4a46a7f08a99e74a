// The real binary with the real planner: a job's way end to end, the metrics
// page, bad flags, and SIGTERM under load.

#include <arpa/inet.h>
#include <fcntl.h>
#include <google/protobuf/text_format.h>
#include <lmdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "client_agents/cc/planner_client.h"
#include "client_agents/cc/program_check.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/digest/digest.h"
#include "search/joint_planner.h"
#include "search/lower/program_proto.h"
#include "search/planner.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"
#include "server/ctl/command.h"

namespace pipeweaver::server {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

std::string* binary = nullptr;  // set by main

// What a server finds at its start.
struct Surroundings {
  // Limits of its own, by resource (RLIMIT_...).
  std::vector<std::pair<int, rlimit>> limits;
  // A descriptor for its standard error; -1: the test's.
  int standard_error = -1;
};

// A running pipeweaver_server.
class ServerProcess {
 public:
  // Runs one that ends by itself, and takes what it prints.
  explicit ServerProcess(std::vector<std::string> flags,
                         const Surroundings& surroundings = {}) {
    FILE* lines = Spawn(std::move(flags), surroundings);
    char line[1024];
    while (fgets(line, sizeof(line), lines) != nullptr) output_ += line;
    fclose(lines);
  }

  // Starts one that serves, and waits for the line that says where.
  static std::unique_ptr<ServerProcess> Serving(
      std::vector<std::string> flags, const Surroundings& surroundings = {}) {
    flags.push_back("--listen_address=127.0.0.1:0");
    flags.push_back("--metrics_address=127.0.0.1:0");
    std::unique_ptr<ServerProcess> server(new ServerProcess());
    FILE* lines = server->Spawn(std::move(flags), surroundings);
    char line[1024] = "";
    EXPECT_NE(fgets(line, sizeof(line), lines), nullptr);
    fclose(lines);
    char address[256] = "";
    int port = 0;
    EXPECT_EQ(
        std::sscanf(line, "listening on %255[^,], metrics on 127.0.0.1:%d",
                    address, &port),
        2)
        << line;
    server->address_ = address;
    server->metrics_port_ = static_cast<uint16_t>(port);
    return server;
  }

  ~ServerProcess() {
    if (pid_ < 0) return;
    kill(pid_, SIGKILL);
    Wait();
  }

  void Terminate() { kill(pid_, SIGTERM); }
  // Exit code; -1 when a signal ended it.
  int Wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  const std::string& output() const { return output_; }
  const std::string& address() const { return address_; }

  // A socket that is connected to it; -1: it takes no connections.
  int Connection() const {
    int port = 0;
    Must(absl::SimpleAtoi(address_.substr(address_.rfind(':') + 1), &port));
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons(static_cast<uint16_t>(port));
    if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0) {
      return fd;
    }
    close(fd);
    return -1;
  }

  // Whether it takes connections.
  bool Listens() const {
    const int fd = Connection();
    if (fd >= 0) close(fd);
    return fd >= 0;
  }

  std::string MetricsPage() const {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons(metrics_port_);
    std::string page;
    if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0) {
      const std::string request =
          "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n";
      Must(write(fd, request.data(), request.size()) ==
           static_cast<ssize_t>(request.size()));
      char buffer[4096];
      ssize_t n;
      while ((n = read(fd, buffer, sizeof(buffer))) > 0) {
        page.append(buffer, n);
      }
    }
    close(fd);
    return page;
  }

  // Value of the sample whose line starts with `sample`; -1: not there.
  double Metric(const std::string& sample) const {
    const std::string page = MetricsPage();
    const size_t at = page.find("\n" + sample + " ");
    double value = -1;
    if (at == std::string::npos) return value;
    const size_t begin = at + sample.size() + 2;
    if (!absl::SimpleAtod(page.substr(begin, page.find('\n', begin) - begin),
                          &value)) {
      return -1;
    }
    return value;
  }

 private:
  ServerProcess() = default;

  // Starts the binary; returns its standard output.
  FILE* Spawn(std::vector<std::string> flags,
              const Surroundings& surroundings) {
    int out[2];
    Must(pipe(out) == 0);
    flags.insert(flags.begin(), *binary);
    std::vector<char*> argv;
    argv.reserve(flags.size() + 1);
    for (std::string& flag : flags) argv.push_back(flag.data());
    argv.push_back(nullptr);
    pid_ = fork();
    Must(pid_ >= 0);
    if (pid_ == 0) {
      dup2(out[1], STDOUT_FILENO);
      close(out[0]);
      close(out[1]);
      if (surroundings.standard_error >= 0) {
        dup2(surroundings.standard_error, STDERR_FILENO);
      }
      for (const auto& [resource, limit] : surroundings.limits) {
        Must(setrlimit(resource, &limit) == 0);
      }
      execv(argv[0], argv.data());
      _exit(127);
    }
    close(out[1]);
    return fdopen(out[0], "r");
  }

  static void Must(bool ok) {
    if (ok) return;
    std::perror("pipeweaver_server_test");
    std::abort();
  }

  pid_t pid_ = -1;
  std::string output_;
  std::string address_;
  uint16_t metrics_port_ = 0;
};

client::PlannerClient Connect(const ServerProcess& server) {
  client::PlannerClientOptions options;
  options.call_timeout = std::chrono::seconds(60);
  return *client::PlannerClient::Create(server.address(), options);
}

v1::RegisterJobResponse Register(client::PlannerClient& client,
                                 const v1::Job& job, uint64_t attempt = 0) {
  v1::RegisterJobRequest request;
  request.set_request_id("start");
  request.set_attempt(attempt);
  *request.mutable_job() = job;
  const auto registered = client.RegisterJob(request);
  EXPECT_TRUE(registered.ok()) << registered.status();
  v1::ConfirmLayoutRequest confirm;
  confirm.set_job(job.name());
  confirm.set_attempt(registered->attempt());
  confirm.set_layout_digest(registered->layout_digest());
  EXPECT_TRUE(client.ConfirmLayout(confirm).ok());
  return *registered;
}

v1::SubmitStepRequest Submission(const v1::Job& job,
                                 const v1::RegisterJobResponse& registered,
                                 uint64_t step, int microbatches) {
  v1::SubmitStepRequest request;
  request.mutable_key()->set_job(job.name());
  request.mutable_key()->set_attempt(registered.attempt());
  request.mutable_key()->set_step(step);
  request.set_layout_digest(registered.layout_digest());
  semu::SampleOptions options;
  options.seed = step;
  options.microbatches = microbatches;
  *request.mutable_batch() = *semu::SampleBatch(job, options);
  return request;
}

TEST(PipeweaverServerTest, BadFlagsEndItWithTwo) {
  EXPECT_EQ(ServerProcess({"--validate", "--planner_threads=-1"}).Wait(), 2);
  EXPECT_EQ(ServerProcess({"--config=/nonexistent"}).Wait(), 2);
  EXPECT_EQ(
      ServerProcess({"--validate", "--config=" + ::testing::TempDir()}).Wait(),
      2);
  EXPECT_EQ(ServerProcess({"--validate", "server.textproto"}).Wait(), 2);
}

TEST(PipeweaverServerTest, ValidatePrintsTheConfigWithFlagsOverTheFile) {
  const std::string path = ::testing::TempDir() + "/server.textproto";
  std::ofstream(path) << "planner_threads: 3 drain_ms: 77\n";
  ServerProcess server(
      {"--validate", "--config=" + path, "--planner_threads=5"});
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_THAT(server.output(), HasSubstr("planner_threads: 5\n"));
  EXPECT_THAT(server.output(), HasSubstr("drain_ms: 77\n"));
}

TEST(PipeweaverServerTest, ThreadsThatCannotBeStartedEndItWithOne) {
  int log[2];
  ASSERT_EQ(pipe(log), 0);
  // Less than the stacks of as many threads.
  Surroundings surroundings;
  surroundings.limits = {{RLIMIT_AS, {1u << 30, 1u << 30}}};
  surroundings.standard_error = log[1];
  ServerProcess server({"--planner_threads=1024", "--metrics_address=none",
                        "--listen_address=127.0.0.1:0"},
                       surroundings);
  EXPECT_EQ(server.Wait(), 1);
  close(log[1]);
  std::string text(1 << 16, '\0');
  text.resize(std::max<ssize_t>(0, read(log[0], text.data(), text.size())));
  close(log[0]);
  EXPECT_THAT(text, HasSubstr("RESOURCE_EXHAUSTED: planner_threads: 1024"));
}

TEST(PipeweaverServerTest, ItOutlivesTheReaderOfItsLog) {
  int log[2];
  ASSERT_EQ(pipe(log), 0);
  close(log[0]);
  Surroundings surroundings;
  surroundings.standard_error = log[1];
  const auto server = ServerProcess::Serving({}, surroundings);
  close(log[1]);
  EXPECT_TRUE(Connect(*server).ListJobs({}).ok());
  server->Terminate();
  EXPECT_EQ(server->Wait(), 0);
}

constexpr rlim_t kFewDescriptors = 100;

// Connections to `server`, one more than it may have by `kFewDescriptors`.
std::vector<int> ManyConnections(const ServerProcess& server) {
  std::vector<int> connections;
  while (connections.size() <= kFewDescriptors) {
    const int fd = server.Connection();
    if (fd < 0) break;  // it has ended
    connections.push_back(fd);
  }
  return connections;
}

TEST(PipeweaverServerTest, ItTakesConnectionsPastTheSoftLimitOnDescriptors) {
  rlimit limit = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  ASSERT_GE(limit.rlim_max, 3 * kFewDescriptors);
  limit.rlim_cur = kFewDescriptors;
  Surroundings surroundings;
  surroundings.limits = {{RLIMIT_NOFILE, limit}};
  const auto server = ServerProcess::Serving({}, surroundings);
  const std::vector<int> connections = ManyConnections(*server);
  EXPECT_TRUE(Connect(*server).ListJobs({}).ok());
  for (const int fd : connections) close(fd);
}

TEST(PipeweaverServerTest, OutOfDescriptorsItEndsWithOne) {
  Surroundings surroundings;
  surroundings.limits = {{RLIMIT_NOFILE, {kFewDescriptors, kFewDescriptors}}};
  const auto server = ServerProcess::Serving({}, surroundings);
  const std::vector<int> connections = ManyConnections(*server);
  ASSERT_FALSE(connections.empty());
  // To the end of the first one, or 30 s of silence.
  timeval wait = {};
  wait.tv_sec = 30;
  setsockopt(connections[0], SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
  char buffer[256];
  ssize_t n;
  while ((n = read(connections[0], buffer, sizeof(buffer))) > 0) {
  }
  const bool ended = n == 0 || errno == ECONNRESET;
  for (const int fd : connections) close(fd);
  ASSERT_TRUE(ended);
  EXPECT_EQ(server->Wait(), 1);
}

TEST(PipeweaverServerTest, PlansRealStepsEndToEnd) {
  const auto server = ServerProcess::Serving({});
  client::PlannerClient client = Connect(*server);
  const v1::Job job = *semu::MakeSetup("vlm-s");
  const v1::RegisterJobResponse registered = Register(client, job);
  v1::SubmitStepRequest step = Submission(job, registered, 0, 8);
  step.set_seed(7);
  step.set_budget_evaluations(20);
  ASSERT_TRUE(client.SubmitStep(step).ok());
  const auto plan = client.GetPlan(step.key());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(plan->report().certified());
  EXPECT_GE(plan->report().gap(), 0);
  for (int rank = 0; rank < job.parallelism().pipeline_parallel(); ++rank) {
    const auto program = client.GetProgram(step.key(), rank);
    ASSERT_TRUE(program.ok()) << program.status();
    EXPECT_EQ(program->plan_digest(), plan->plan_digest());
    const auto checked = client::CheckProgram(*program, step.key(), rank);
    EXPECT_TRUE(checked.ok()) << checked.status();
  }

  // The emulator, asked again under the same conditions, says the same.
  v1::SimulatePlanRequest simulate;
  *simulate.mutable_key() = step.key();
  const auto simulated = client.SimulatePlan(simulate);
  ASSERT_TRUE(simulated.ok()) << simulated.status();
  EXPECT_EQ(simulated->makespan_ns(0), plan->report().makespan_ns());
  simulate.set_bandwidth_factor(0.01);
  EXPECT_GT(client.SimulatePlan(simulate)->makespan_ns(0),
            plan->report().makespan_ns());
  // Runs of neighbouring seeds differ all.
  simulate.set_duration_noise(0.1);
  simulate.set_runs(10);
  std::set<int64_t> makespans;
  for (const uint64_t seed : {1, 2, 3}) {
    simulate.set_seed(seed);
    const auto noisy = client.SimulatePlan(simulate);
    ASSERT_TRUE(noisy.ok()) << noisy.status();
    makespans.insert(noisy->makespan_ns().begin(), noisy->makespan_ns().end());
  }
  EXPECT_EQ(makespans.size(), 30);

  // Noise that a plan's identity would not show is none.
  v1::SubmitStepRequest noisy_step = Submission(job, registered, 1, 8);
  noisy_step.set_budget_evaluations(5);
  noisy_step.set_duration_noise(1e-7);
  ASSERT_TRUE(client.SubmitStep(noisy_step).ok());
  const auto noisy_plan = client.GetPlan(noisy_step.key());
  ASSERT_TRUE(noisy_plan.ok()) << noisy_plan.status();
  EXPECT_EQ(noisy_plan->report().expected_makespan_ns(), 0);

  // Another server, given the same, seals the same plan.
  const auto other = ServerProcess::Serving({"--planner_threads=3"});
  client::PlannerClient other_client = Connect(*other);
  EXPECT_EQ(
      Register(other_client, job, registered.attempt()).SerializeAsString(),
      registered.SerializeAsString());
  ASSERT_TRUE(other_client.SubmitStep(step).ok());
  EXPECT_EQ(other_client.GetPlan(step.key())->plan_digest(),
            plan->plan_digest());

  EXPECT_EQ(server->Metric("pipeweaver_jobs"), 1);
  EXPECT_EQ(server->Metric(
                "pipeweaver_plans_sealed_total{origin=\"search_finished\"}"),
            2);
}

TEST(PipeweaverServerTest, PlansThatGiveWayUnreadAreCounted) {
  const auto server = ServerProcess::Serving({"--max_plan_bytes=1048576"});
  client::PlannerClient client = Connect(*server);
  const v1::Job job = *semu::MakeSetup("vlm-s");
  const v1::RegisterJobResponse registered = Register(client, job);
  const auto plan = [&](uint64_t step) {
    const v1::SubmitStepRequest request =
        Submission(job, registered, step, /*microbatches=*/64);
    EXPECT_TRUE(client.SubmitStep(request).ok());
    EXPECT_TRUE(client.GetPlan(request.key()).ok());
    return request.key();
  };
  const v1::PlanKey first = plan(0);
  EXPECT_EQ(server->Metric("pipeweaver_plans_gave_way_total"), 0);
  for (uint64_t step = 1; step < 8 && client.GetPlan(first).ok(); ++step) {
    plan(step);
  }
  EXPECT_EQ(client.GetPlan(first).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(server->Metric("pipeweaver_plans_gave_way_total"), 1);
}

std::string ReadFile(const std::string& path) {
  std::ifstream in(path);
  EXPECT_TRUE(in) << path << " is missing";
  return std::string(std::istreambuf_iterator<char>(in), {});
}

TEST(PipeweaverServerTest, AlertsAndDashboardReadWhatIsThere) {
  const auto server =
      ServerProcess::Serving({"--subgraph_store_redis=unix:/nonexistent/r"});
  client::PlannerClient client = Connect(*server);
  const v1::Job job = *semu::MakeSetup("vlm-s");
  const v1::SubmitStepRequest step =
      Submission(job, Register(client, job), 0, 2);
  ASSERT_TRUE(client.SubmitStep(step).ok());
  ASSERT_TRUE(client.GetPlan(step.key()).ok());
  const std::string page = server->MetricsPage();
  const std::regex metric("pipeweaver_[a-z_]+");
  for (const char* path :
       {"deploy/monitoring/alerts.yml", "deploy/monitoring/dashboard.json"}) {
    const std::string text = ReadFile(path);
    int read = 0;
    for (std::sregex_iterator it(text.begin(), text.end(), metric), end;
         it != end; ++it, ++read) {
      // A sample, or a family of them.
      EXPECT_THAT(page, AnyOf(HasSubstr("\n" + it->str() + "{"),
                              HasSubstr("\n# TYPE " + it->str() + " ")))
          << path;
    }
    EXPECT_GT(read, 0) << path;
  }
}

TEST(PipeweaverServerTest, PromtoolTakesTheAlertsAndTheDashboard) {
  if (std::system("command -v promtool >/dev/null 2>&1") != 0) {
    GTEST_SKIP() << "skipped: promtool (Debian package prometheus) missing";
  }
  EXPECT_EQ(std::system("cd deploy/monitoring && promtool check config "
                        "prometheus.yml && promtool test rules "
                        "alerts_test.yml"),
            0);
  // The dashboard's expressions, as rules.
  nlohmann::json rules = nlohmann::json::array();
  const nlohmann::json dashboard =
      nlohmann::json::parse(ReadFile("deploy/monitoring/dashboard.json"));
  for (const nlohmann::json& panel : dashboard.at("panels")) {
    if (panel.at("type") == "row") continue;
    for (const nlohmann::json& target : panel.at("targets")) {
      rules.push_back({{"record", absl::StrCat("expression:", rules.size())},
                       {"expr", absl::StrReplaceAll(
                                    target.at("expr").get<std::string>(),
                                    {{"$__rate_interval", "1m"}, {"$", ""}})}});
    }
  }
  EXPECT_GT(rules.size(), 0u);
  const nlohmann::json file = {
      {"groups", {{{"name", "dashboard"}, {"rules", rules}}}}};
  const std::string path = ::testing::TempDir() + "/dashboard_rules.yml";
  std::ofstream(path) << file.dump();
  EXPECT_EQ(std::system(("promtool check rules " + path).c_str()), 0);
}

// A job of two replicas whose executor feeds moved microbatches, and a step of
// it in which replica 1 has much more to do.
v1::Job PairJob() {
  v1::Job job = *semu::MakeSetup("vlm-s");
  job.set_name("pair");
  job.mutable_parallelism()->set_data_parallel(2);
  job.mutable_executor()->set_moved_microbatches(true);
  return job;
}

v1::SubmitStepRequest UnevenSubmission(
    const v1::Job& job, const v1::RegisterJobResponse& registered,
    uint64_t step, uint32_t replica) {
  v1::SubmitStepRequest request = Submission(job, registered, step, 6);
  semu::SampleOptions options;
  options.seed = 10 + replica;
  options.microbatches = 6;
  options.max_images = replica == 0 ? 4 : 40;
  *request.mutable_batch() = *semu::SampleBatch(job, options);
  request.mutable_key()->set_replica(replica);
  request.set_budget_evaluations(20);
  request.mutable_joint_wait()->set_seconds(60);
  return request;
}

// The programs of all ranks of both replicas, checked; serialised.
std::vector<v1::Program> Programs(client::PlannerClient& client,
                                  const v1::Job& job, v1::PlanKey key) {
  std::vector<v1::Program> programs;
  for (const uint32_t replica : {0, 1}) {
    key.set_replica(replica);
    for (int rank = 0; rank < job.parallelism().pipeline_parallel(); ++rank) {
      auto program = client.GetProgram(key, rank);
      EXPECT_TRUE(program.ok()) << program.status();
      const auto checked = client::CheckProgram(*program, key, rank);
      EXPECT_TRUE(checked.ok()) << checked.status();
      programs.push_back(*std::move(program));
    }
  }
  return programs;
}

int64_t SlowestMakespan(client::PlannerClient& client, v1::PlanKey key) {
  int64_t slowest_ns = 0;
  for (const uint32_t replica : {0, 1}) {
    key.set_replica(replica);
    const auto plan = client.GetPlan(key);
    EXPECT_TRUE(plan.ok()) << plan.status();
    slowest_ns = std::max(slowest_ns, plan->report().makespan_ns());
  }
  return slowest_ns;
}

TEST(PipeweaverServerTest, ALayoutIsProposedForTheSampleBatches) {
  const auto server = ServerProcess::Serving({});
  client::PlannerClient client = Connect(*server);
  v1::RegisterJobRequest request;
  request.set_request_id("start");
  *request.mutable_job() = *semu::MakeSetup("vlm-s");
  const semu::Job job = *semu::JobFromProto(request.job());
  std::vector<semu::Batch> samples;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    semu::SampleOptions sample;
    sample.seed = seed;
    sample.microbatches = 8;
    *request.add_sample_batches() = *semu::SampleBatch(request.job(), sample);
    samples.push_back(
        *semu::BatchFromProto(request.sample_batches().at(seed - 1), job));
  }
  const auto registered = client.RegisterJob(request);
  ASSERT_TRUE(registered.ok()) << registered.status();
  const std::unique_ptr<search::StepPlanner> planner =
      search::MakeStepPlanner();
  const auto layout_of = [&](const search::PrepareOptions& prepare) {
    const auto prepared = planner->Prepare(job, std::nullopt, prepare);
    EXPECT_TRUE(prepared.ok()) << prepared.status();
    return CanonicalDigest(semu::LayoutToProto((*prepared)->layout, job));
  };
  search::PrepareOptions options;
  options.samples = samples;
  EXPECT_EQ(registered->layout_digest(), layout_of(options));
  EXPECT_NE(registered->layout_digest(), layout_of({}));

  // The job is the same without them, and keeps its layout.
  request.set_request_id("restart");
  request.clear_sample_batches();
  const auto again = client.RegisterJob(request);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->layout_digest(), registered->layout_digest());
  EXPECT_EQ(again->job_digest(), registered->job_digest());
}

TEST(PipeweaverServerTest, MicrobatchesMoveBetweenReplicas) {
  const auto server = ServerProcess::Serving({});
  client::PlannerClient client = Connect(*server);
  const v1::Job job = PairJob();
  const v1::RegisterJobResponse registered = Register(client, job);
  v1::PlanKey moved_key;
  std::string batch_digests;
  for (const bool moves : {false, true}) {
    for (const uint32_t replica : {1, 0}) {
      v1::SubmitStepRequest step =
          UnevenSubmission(job, registered, moves ? 1 : 0, replica);
      step.set_move_microbatches(moves);
      ASSERT_TRUE(client.SubmitStep(step).ok());
      moved_key = step.key();
      if (moves) {
        batch_digests = CanonicalDigest(step.batch()) + batch_digests;
      }
    }
  }
  v1::PlanKey unmoved_key = moved_key;
  unmoved_key.set_step(0);
  // The slowest replica, which ends the step, has less to do.
  EXPECT_LT(SlowestMakespan(client, moved_key),
            0.9 * SlowestMakespan(client, unmoved_key));

  // Not asked for, nothing is added to what planning alone makes.
  const semu::Job value = *semu::JobFromProto(job);
  const std::unique_ptr<search::StepPlanner> planner =
      search::MakeStepPlanner();
  const auto plannable = *planner->Prepare(value, std::nullopt, {});
  std::vector<semu::Batch> batches;
  for (const uint32_t replica : {0, 1}) {
    batches.push_back(*semu::BatchFromProto(
        UnevenSubmission(job, registered, 0, replica).batch(), value));
  }
  search::PlanOptions options;
  options.search.seed = 0;
  options.search.budget.evaluations = 2 * 20;
  const auto plans = search::PlanJointly(*planner, *plannable,
                                         {&batches[0], &batches[1]}, options);
  for (const v1::Program& program : Programs(client, job, unmoved_key)) {
    EXPECT_EQ(AgreementDigest(program), "");
    EXPECT_TRUE(program.identity().moves_digest().empty());
    const auto& plan = plans[program.identity().key().replica()];
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(
        program.SerializeAsString(),
        search::SerializePlan(plan->step, plan->programs, program.identity())
            .programs[program.rank()]);
  }
  const std::vector<v1::Program> programs = Programs(client, job, moved_key);
  ASSERT_TRUE(programs[0].has_moves());
  for (const v1::Program& program : programs) {
    const v1::PlanIdentity& identity = program.identity();
    EXPECT_EQ(identity.joint_digest(), Sha256(batch_digests));
    EXPECT_EQ(identity.batch_digest(),
              batch_digests.substr(32 * identity.key().replica(), 32));
    // All ranks of all replicas have one thing to agree on.
    EXPECT_EQ(AgreementDigest(program), AgreementDigest(programs[0]));
    EXPECT_EQ(CanonicalBytes(program.moves()),
              CanonicalBytes(programs[0].moves()));
    // The sizes are those that the origins' replicas submitted.
    const int first = 6 * static_cast<int>(identity.key().replica());
    const semu::Batch batch = *semu::BatchFromProto(program.batch(), value);
    ASSERT_EQ(batch.microbatches.size(), 6u);
    for (int b = 0; b < 6; ++b) {
      const v1::SubmitStepRequest from = UnevenSubmission(
          job, registered, 1, program.moves().from_replica(first + b));
      EXPECT_EQ(batch.microbatches[b],
                semu::BatchFromProto(from.batch(), value)
                    ->microbatches[program.moves().from_microbatch(first + b)]);
    }
  }

  // Read again, the bytes are the same; another server with other threads
  // seals the same.
  const auto other = ServerProcess::Serving({"--planner_threads=3"});
  client::PlannerClient other_client = Connect(*other);
  Register(other_client, job, registered.attempt());
  for (const uint32_t replica : {0, 1}) {
    v1::SubmitStepRequest step = UnevenSubmission(job, registered, 1, replica);
    step.set_move_microbatches(true);
    ASSERT_TRUE(other_client.SubmitStep(step).ok());
  }
  const std::vector<v1::Program> again = Programs(client, job, moved_key);
  const std::vector<v1::Program> elsewhere =
      Programs(other_client, job, moved_key);
  for (size_t i = 0; i < programs.size(); ++i) {
    EXPECT_EQ(programs[i].SerializeAsString(), again[i].SerializeAsString());
    EXPECT_EQ(programs[i].SerializeAsString(),
              elsewhere[i].SerializeAsString());
  }

  // What a person sees.
  std::ostringstream out;
  std::ostringstream err;
  EXPECT_EQ(ctl::RunJobCommand({"plan", "pair", "1", "--replica", "1",
                                "--server", server->address()},
                               {out, err}),
            0)
      << err.str();
  EXPECT_THAT(out.str(), HasSubstr("microbatches of other replicas"));
  EXPECT_THAT(out.str(), HasSubstr(" of replica 0"));
}

TEST(PipeweaverServerTest, NothingMovesWhenAReplicaComesTooLate) {
  const auto server = ServerProcess::Serving({});
  client::PlannerClient client = Connect(*server);
  const v1::Job job = PairJob();
  const v1::RegisterJobResponse registered = Register(client, job);
  v1::SubmitStepRequest step;
  for (const uint32_t replica : {0, 1}) {
    step = UnevenSubmission(job, registered, 0, replica);
    step.mutable_joint_wait()->set_seconds(0);
    step.set_move_microbatches(true);
    ASSERT_TRUE(client.SubmitStep(step).ok());
    // It is planned before the other one comes.
    const auto plan = client.GetPlan(step.key());
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_FALSE(plan->has_moves());
    EXPECT_EQ(plan->identity().joint_digest(),
              Sha256(CanonicalDigest(step.batch())));
  }
  for (const v1::Program& program : Programs(client, job, step.key())) {
    EXPECT_FALSE(program.has_moves());
  }
}

TEST(PipeweaverServerTest, ADrainWaitsForNoReplica) {
  const auto server = ServerProcess::Serving({});
  client::PlannerClient client = Connect(*server);
  const v1::Job job = PairJob();
  const v1::SubmitStepRequest step =
      UnevenSubmission(job, Register(client, job), 0, /*replica=*/0);
  ASSERT_TRUE(client.SubmitStep(step).ok());
  absl::StatusOr<v1::Plan> plan;
  std::thread reader([&] { plan = client.GetPlan(step.key()); });
  while (server->Metric("pipeweaver_rpcs_in_flight") < 1) {
  }
  server->Terminate();
  reader.join();
  EXPECT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(server->Wait(), 0);
}

// The costs wait while another process writes to the file.
TEST(PipeweaverServerTest, LayerCostsThatWaitAreWrittenBeforeTheEnd) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/subgraphs.",
                                        static_cast<int64_t>(getpid()));
  const v1::Job job = *semu::MakeSetup("vlm-s");
  const auto plan_a_step = [&](const ServerProcess& server) {
    client::PlannerClient client = Connect(server);
    const v1::SubmitStepRequest step =
        Submission(job, Register(client, job), 0, 2);
    ASSERT_TRUE(client.SubmitStep(step).ok());
    ASSERT_TRUE(client.GetPlan(step.key()).ok());
  };
  {
    const auto server =
        ServerProcess::Serving({"--subgraph_store_file=" + path});
    MDB_env* env = nullptr;
    MDB_txn* txn = nullptr;
    ASSERT_EQ(mdb_env_create(&env), 0);
    ASSERT_EQ(mdb_env_open(env, path.c_str(), MDB_NOSUBDIR, 0600), 0);
    ASSERT_EQ(mdb_txn_begin(env, nullptr, 0, &txn), 0);
    plan_a_step(*server);
    EXPECT_GT(server->Metric("pipeweaver_subgraph_misses_total"), 0);
    server->Terminate();
    while (server->Listens()) {
    }
    mdb_txn_abort(txn);
    mdb_env_close(env);
    EXPECT_EQ(server->Wait(), 0);
  }
  const auto server = ServerProcess::Serving({"--subgraph_store_file=" + path});
  plan_a_step(*server);
  EXPECT_EQ(server->Metric("pipeweaver_subgraph_misses_total"), 0);
}

// Layers of every module of `job`, as if measured at `factor` microseconds a
// token forward and twice that backward.
v1::Profile MeasuredProfile(const v1::Job& job, double factor) {
  v1::Profile profile;
  profile.set_format_version(1);
  profile.set_version(1);
  for (const v1::Module& module : job.modules()) {
    for (const v1::LayerGroup& group : module.layers()) {
      for (const v1::LayerPass pass :
           {v1::LAYER_PASS_FORWARD, v1::LAYER_PASS_BACKWARD}) {
        for (const int64_t tokens : {1, 1'000'000}) {
          v1::MeasuredPoint* point = profile.add_points();
          point->mutable_key()->set_kind(v1::POINT_KIND_LAYER);
          v1::LayerKey* layer = point->mutable_key()->mutable_layer();
          layer->set_module(module.name());
          const std::string kind = v1::LayerKind_Name(group.kind());
          layer->set_layer(absl::AsciiStrToLower(
              kind.substr(std::string("LAYER_KIND_").size())));
          layer->set_pass(pass);
          layer->set_items(1);
          layer->set_tokens(tokens);
          layer->set_sum_squares(tokens * tokens);
          layer->set_max_tokens(tokens);
          const auto ns =
              static_cast<int64_t>(factor * 1e3 * static_cast<double>(tokens) *
                                   (pass == v1::LAYER_PASS_FORWARD ? 1 : 2));
          point->set_count(1);
          point->set_min_ns(ns);
          point->set_median_ns(ns);
          point->set_max_ns(ns);
          point->set_total_ns(ns);
        }
      }
    }
  }
  return profile;
}

TEST(PipeweaverServerTest, PlansRestOnUploadedProfiles) {
  const auto server = ServerProcess::Serving({});
  client::PlannerClient client = Connect(*server);
  const v1::Job job = *semu::MakeSetup("vlm-s");
  const v1::RegisterJobResponse registered = Register(client, job);
  v1::SubmitStepRequest step = Submission(job, registered, 0, 8);
  step.set_budget_evaluations(20);
  ASSERT_TRUE(client.SubmitStep(step).ok());
  const auto analytic = client.GetPlan(step.key());
  ASSERT_TRUE(analytic.ok()) << analytic.status();
  EXPECT_EQ(analytic->report().measured_share(), 0);

  v1::UploadProfileRequest upload;
  upload.set_job(job.name());
  *upload.mutable_profile() = MeasuredProfile(job, 50);
  const auto uploaded = client.UploadProfile(upload);
  ASSERT_TRUE(uploaded.ok()) << uploaded.status();
  EXPECT_GT(uploaded->points_taken(), 0);
  EXPECT_EQ(uploaded->points_left_out(), 0);
  v1::DescribeJobRequest describe;
  describe.set_job(job.name());
  while (client.DescribeJob(describe)->costs().version() == 0) {
  }
  step.mutable_key()->set_step(1);
  ASSERT_TRUE(client.SubmitStep(step).ok());
  const auto measured = client.GetPlan(step.key());
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->report().measured_share(), 1);
  EXPECT_TRUE(measured->report().certified());
  EXPECT_EQ(measured->identity().profile_digest(),
            client.DescribeJob(describe)->costs().profile_digest());
  EXPECT_NE(measured->identity().profile_digest(),
            analytic->identity().profile_digest());
  EXPECT_NE(measured->report().makespan_ns(), analytic->report().makespan_ns());
  EXPECT_EQ(server->Metric("pipeweaver_job_cost_version{job=\"vlm-s\"}"), 1);
  EXPECT_EQ(
      server->Metric("pipeweaver_job_measured_share_ratio{job=\"vlm-s\"}"), 1);
}

TEST(PipeweaverServerTest, AProfileOfTheConfigIsThereAtRegistration) {
  const v1::Job job = *semu::MakeSetup("vlm-s");
  std::string text;
  google::protobuf::TextFormat::PrintToString(MeasuredProfile(job, 50), &text);
  const std::string profile = ::testing::TempDir() + "/vlm-s.profile";
  std::ofstream(profile) << text;
  const std::string config = ::testing::TempDir() + "/profiles.textproto";
  std::ofstream(config) << "profiles { job: \"vlm-s\" file: \"" << profile
                        << "\" }\n";
  const auto server = ServerProcess::Serving({"--config=" + config});
  client::PlannerClient client = Connect(*server);
  const v1::RegisterJobResponse registered = Register(client, job);
  const v1::SubmitStepRequest step = Submission(job, registered, 0, 8);
  ASSERT_TRUE(client.SubmitStep(step).ok());
  const auto plan = client.GetPlan(step.key());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->report().measured_share(), 1);
}

// Ranks report stage times by another machine than the rules describe: the
// predictions follow.
TEST(PipeweaverServerTest, ReportsOfAnotherMachineCorrectPredictions) {
  const auto server = ServerProcess::Serving({});
  client::PlannerClient client = Connect(*server);
  const v1::Job job = *semu::MakeSetup("vlm-s");
  const v1::RegisterJobResponse registered = Register(client, job);
  constexpr double kSlower = 1.3;
  const auto plan_of = [&](uint64_t number) {
    v1::SubmitStepRequest step = Submission(job, registered, 0, 8);
    step.mutable_key()->set_step(number);
    step.set_budget_evaluations(20);
    EXPECT_TRUE(client.SubmitStep(step).ok());
    return *client.GetPlan(step.key());
  };
  const v1::Plan first = plan_of(0);
  for (int rank = 0; rank < job.parallelism().pipeline_parallel(); ++rank) {
    const auto program = client.GetProgram(first.identity().key(), rank);
    ASSERT_TRUE(program.ok()) << program.status();
    v1::ActionColumns actions;
    ASSERT_TRUE(actions.ParseFromString(program->actions()));
    v1::ReportStepRequest report;
    *report.mutable_key() = first.identity().key();
    report.set_plan_digest(first.plan_digest());
    report.set_rank(rank);
    for (const uint64_t duration_ns : actions.duration_ns()) {
      report.add_start_offset_ns(0);
      report.add_duration_ns(
          static_cast<uint64_t>(kSlower * static_cast<double>(duration_ns)));
    }
    report.set_step_ns(static_cast<uint64_t>(
        kSlower * static_cast<double>(first.report().makespan_ns())));
    ASSERT_TRUE(client.ReportStep(report).ok());
  }
  v1::DescribeJobRequest describe;
  describe.set_job(job.name());
  v1::JobCosts costs;
  do {
    costs = client.DescribeJob(describe)->costs();
  } while (costs.observations() == 0 || costs.drifted_steps() == 0);
  EXPECT_NEAR(costs.error_before(), 1 - 1 / kSlower, 0.01);
  EXPECT_LT(costs.error_after(), 0.01);
  EXPECT_EQ(server->Metric("pipeweaver_job_drift{job=\"vlm-s\"}"), 1);
  // Reports are worked in one after the other: planned between two looks at
  // the same costs.
  v1::Plan second;
  std::string before, after;
  for (uint64_t number = 1; number == 1 || before != after; ++number) {
    before = client.DescribeJob(describe)->costs().profile_digest();
    second = plan_of(number);
    after = client.DescribeJob(describe)->costs().profile_digest();
  }
  EXPECT_NEAR(static_cast<double>(second.report().makespan_ns()) /
                  static_cast<double>(first.report().makespan_ns()),
              kSlower, 0.03);
  EXPECT_EQ(second.identity().profile_digest(), after);
  EXPECT_NE(second.identity().profile_digest(),
            first.identity().profile_digest());
}

TEST(PipeweaverServerTest, SigtermUnderLoadLosesNoAcceptedCall) {
  const auto server =
      ServerProcess::Serving({"--search_budget_ms=1500", "--drain_ms=30000"});
  client::PlannerClient client = Connect(*server);
  const v1::Job job = *semu::MakeSetup("vlm-s");
  const v1::RegisterJobResponse registered = Register(client, job);
  constexpr int kSteps = 3;
  std::vector<v1::PlanKey> keys;
  for (int step = 0; step < kSteps; ++step) {
    const v1::SubmitStepRequest request = Submission(job, registered, step, 8);
    ASSERT_TRUE(client.SubmitStep(request).ok());
    keys.push_back(request.key());
  }
  // Reads that wait, and calls that come and go.
  const int ranks = job.parallelism().pipeline_parallel();
  std::atomic<int> read = 0;
  std::vector<std::thread> threads;
  for (const v1::PlanKey& key : keys) {
    for (int rank = 0; rank < ranks; ++rank) {
      threads.emplace_back([&, rank] {
        const auto program = client.GetProgram(key, rank);
        EXPECT_TRUE(program.ok()) << program.status();
        ++read;
      });
    }
  }
  while (server->Metric("pipeweaver_rpcs_in_flight") < kSteps * ranks) {
    ASSERT_EQ(read, 0) << "the plans came too soon for this test";
  }
  std::atomic<int> answered = 0;
  std::atomic<bool> over = false;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      client::PlannerClientOptions options;
      options.call_timeout = std::chrono::seconds(5);
      auto own = *client::PlannerClient::Create(server->address(), options);
      v1::DescribeJobRequest request;
      request.set_job(job.name());
      while (!over) {
        const absl::Status status = own.DescribeJob(request).status();
        if (status.ok()) {
          ++answered;
          continue;
        }
        // Refused, not lost.
        EXPECT_TRUE(status.code() == absl::StatusCode::kUnavailable ||
                    status.code() == absl::StatusCode::kDeadlineExceeded)
            << status;
      }
    });
  }
  while (answered < 100) std::this_thread::yield();
  server->Terminate();
  EXPECT_EQ(server->Wait(), 0);
  over = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(read, kSteps * ranks);
}

}  // namespace
}  // namespace pipeweaver::server

int main(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s SERVER_BINARY\n", argv[0]);
    return 2;
  }
  std::string path = argv[1];
  pipeweaver::server::binary = &path;
  return RUN_ALL_TESTS();
}
