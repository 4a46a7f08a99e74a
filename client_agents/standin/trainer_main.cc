// A stand-in for a distributed trainer: one process that submits each step's
// batch metadata ahead of time, and one process a pipeline rank that fetches
// its program, checks it and walks it against the others' with real messages
// and sleeps in place of kernels. Prints one line a step.
//
//   pipeweaver_trainer --server=ADDRESS --job_file=JOB.textproto
//       --batch_files=A.textproto,B.textproto,... [--steps=N]
//       [--sample_files=C.textproto,D.textproto,...]
//
// Exit codes: 0 all steps ran; 1 a step failed; 2 wrong usage.

#include <fcntl.h>
#include <google/protobuf/text_format.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "client_agents/cc/planner_client.h"
#include "client_agents/cc/program_check.h"
#include "client_agents/standin/control.h"
#include "client_agents/standin/program_walk.h"
#include "client_agents/standin/rendezvous_transport.h"
#include "nlohmann/json.hpp"
#include "pipeweaver/v1/planner_service.pb.h"
#include "semu/base/flags_help.h"

ABSL_FLAG(std::string, server, "127.0.0.1:7411", "address of the planner");
ABSL_FLAG(std::string, ca_file, "",
          "PEM file of the authority that signed the planner's certificate");
ABSL_FLAG(std::string, cert_file, "",
          "PEM file of the certificate that the planner asks for");
ABSL_FLAG(std::string, key_file, "", "PEM file of its key");
ABSL_FLAG(std::string, token_file, "",
          "file with the bearer token that the planner asks for");
ABSL_FLAG(std::string, job_file, "", "v1.Job as protobuf text");
ABSL_FLAG(std::vector<std::string>, batch_files, {},
          "v1.BatchMetadata as protobuf text, one a step, used in turn");
ABSL_FLAG(std::vector<std::string>, sample_files, {},
          "v1.BatchMetadata as protobuf text, for which a layout is proposed");
ABSL_FLAG(int, steps, 8, "steps to run");
ABSL_FLAG(int, ahead, 2, "steps that are submitted ahead");
ABSL_FLAG(double, time_scale, 0.01, "slept time over predicted time");
ABSL_FLAG(int, needed_in_ms, 1000, "time from submission to need");
ABSL_FLAG(bool, compare, true, "ask for the gain over each baseline");
ABSL_FLAG(bool, header, true, "print the head of the table");
ABSL_FLAG(std::string, json_log, "", "file for one JSON object a step");

namespace pipeweaver::client {
namespace {

// The fallback of a real trainer is the safe program; the stand-in exists to
// show that the service delivers, so it fails instead.
constexpr auto kCallTimeout = std::chrono::seconds(60);

// Steps that have run and are not described yet, at most: the planner holds a
// window of steps, and a plan that is to be described must be in it.
constexpr uint64_t kMostUndescribed = 2;

struct Trainer {
  v1::Job job;
  std::vector<v1::BatchMetadata> batches;
  std::vector<v1::BatchMetadata> samples;
  int ranks = 0;
  uint64_t steps = 0;

  const v1::BatchMetadata& BatchOf(uint64_t step) const {
    return batches[step % batches.size()];
  }
  v1::PlanKey Key(uint64_t attempt, uint64_t step) const {
    v1::PlanKey key;
    key.set_job(job.name());
    key.set_attempt(attempt);
    key.set_step(step);
    return key;
  }
};

template <typename Message>
absl::StatusOr<Message> ReadTextProto(const std::string& path) {
  std::ifstream in(path);
  in.peek();  // fails on a folder, where the iterators would throw
  std::string text;
  if (in) text.assign(std::istreambuf_iterator<char>(in), {});
  Message message;
  if (!in || !google::protobuf::TextFormat::ParseFromString(text, &message)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": not a readable ",
                     Message::descriptor()->full_name(), " in protobuf text"));
  }
  return message;
}

absl::StatusOr<PlannerClient> Connect() {
  PlannerClientOptions options;
  options.call_timeout = kCallTimeout;
  options.ca_file = absl::GetFlag(FLAGS_ca_file);
  options.cert_file = absl::GetFlag(FLAGS_cert_file);
  options.key_file = absl::GetFlag(FLAGS_key_file);
  options.token_file = absl::GetFlag(FLAGS_token_file);
  return PlannerClient::Create(absl::GetFlag(FLAGS_server), options);
}

uint64_t DigestHead(const std::string& digest) {
  uint64_t head = 0;
  for (int i = 0; i < 8; ++i) {
    head = head << 8 | static_cast<uint8_t>(digest[i]);
  }
  return head;
}

void Fail(const ControlSocket& parent, absl::string_view who,
          const absl::Status& status) {
  ControlMessage message;
  message.kind = ControlMessage::kFailed;
  message.SetText(absl::StrCat(who, ": ", status.ToString()));
  // The parent may be gone already: then there is nobody to tell.
  parent.Send(message).IgnoreError();
}

// ---- One pipeline rank -----------------------------------------------------

// Programs that a rank holds, fetched ahead by one thread, run by another.
class HeldPrograms {
 public:
  void Put(uint64_t step, CheckedProgram program) {
    const std::lock_guard<std::mutex> lock(mutex_);
    programs_[step] = std::move(program);
  }
  // REQUIRES: held.
  CheckedProgram Take(uint64_t step) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::move(programs_.extract(step).mapped());
  }

 private:
  std::mutex mutex_;
  std::map<uint64_t, CheckedProgram> programs_;
};

absl::Status FetchPrograms(const Trainer& trainer, int rank,
                           const ControlSocket& parent, HeldPrograms& held) {
  absl::StatusOr<PlannerClient> client = Connect();
  if (!client.ok()) return client.status();
  while (true) {
    const absl::StatusOr<ControlMessage> submitted = parent.Receive();
    if (!submitted.ok()) return absl::OkStatus();  // the run is over
    const v1::PlanKey key = trainer.Key(submitted->value, submitted->step);
    absl::StatusOr<v1::Program> program = client->GetProgram(key, rank);
    if (!program.ok()) return program.status();
    absl::StatusOr<CheckedProgram> checked =
        CheckProgram(*std::move(program), key, rank);
    if (!checked.ok()) return checked.status();
    ControlMessage message;
    message.kind = ControlMessage::kHeld;
    message.step = submitted->step;
    message.value = DigestHead(checked->program.plan_digest());
    message.time_ns = SteadyNowNs();
    held.Put(submitted->step, *std::move(checked));
    if (!parent.Send(message).ok()) return absl::OkStatus();
  }
}

absl::Status RunPrograms(int rank, const ControlSocket& parent,
                         HeldPrograms& held, RendezvousTransport& transport) {
  absl::StatusOr<PlannerClient> client = Connect();
  if (!client.ok()) return client.status();
  WalkOptions options;
  options.time_scale = absl::GetFlag(FLAGS_time_scale);
  while (true) {
    const absl::StatusOr<ControlMessage> run = parent.Receive();
    if (!run.ok()) return absl::OkStatus();  // the run is over
    const CheckedProgram program = held.Take(run->step);
    // Transfers of a step are fewer than 2^32: their column is 32 bits wide.
    options.first_transfer = run->step << 32;
    absl::StatusOr<WalkTimes> times = WalkProgram(program, options, transport);
    if (!times.ok()) return times.status();
    const double scale = 1 / options.time_scale;
    v1::ReportStepRequest report;
    *report.mutable_key() = program.program.identity().key();
    report.set_plan_digest(program.program.plan_digest());
    report.set_rank(rank);
    for (const uint64_t ns : times->start_offset_ns) {
      report.add_start_offset_ns(static_cast<uint64_t>(ns * scale));
    }
    for (const uint64_t ns : times->duration_ns) {
      report.add_duration_ns(static_cast<uint64_t>(ns * scale));
    }
    report.set_step_ns(static_cast<uint64_t>(times->step_ns * scale));
    const absl::StatusOr<v1::ReportStepResponse> reported =
        client->ReportStep(report);
    if (!reported.ok()) return reported.status();
    ControlMessage done;
    done.kind = ControlMessage::kDone;
    done.step = run->step;
    done.value = times->step_ns;
    done.messages = times->messages;
    if (!parent.Send(done).ok()) return absl::OkStatus();
  }
}

int RankMain(const Trainer& trainer, int rank, const ControlSocket& fetch,
             const ControlSocket& run, std::vector<int> peers) {
  RendezvousTransport transport(rank, std::move(peers));
  HeldPrograms held;
  std::thread fetcher([&] {
    if (absl::Status status = FetchPrograms(trainer, rank, fetch, held);
        !status.ok()) {
      Fail(fetch, absl::StrCat("rank ", rank), status);
    }
  });
  const absl::Status status = RunPrograms(rank, run, held, transport);
  if (!status.ok()) Fail(run, absl::StrCat("rank ", rank), status);
  fetcher.join();
  return status.ok() ? 0 : 1;
}

// ---- The submitter ---------------------------------------------------------

absl::StatusOr<uint64_t> Register(const Trainer& trainer, PlannerClient& client,
                                  std::string& layout_digest) {
  v1::RegisterJobRequest request;
  request.set_request_id(
      absl::StrCat("standin-", getpid(), "-", SteadyNowNs()));
  *request.mutable_job() = trainer.job;
  request.mutable_sample_batches()->Add(trainer.samples.begin(),
                                        trainer.samples.end());
  absl::StatusOr<v1::RegisterJobResponse> response =
      client.RegisterJob(request);
  if (!response.ok()) return response.status();
  layout_digest = response->layout_digest();
  if (!response->layout_confirmed()) {
    v1::ConfirmLayoutRequest confirm;
    confirm.set_job(trainer.job.name());
    confirm.set_attempt(response->attempt());
    confirm.set_layout_digest(layout_digest);
    if (auto confirmed = client.ConfirmLayout(confirm); !confirmed.ok()) {
      return confirmed.status();
    }
  }
  return response->attempt();
}

constexpr const char* kBaselines[] = {"megatron", "1f1b", "interleaved-1f1b"};

// JSON object with what the planner says of a step.
absl::StatusOr<std::string> DescribeStep(const Trainer& trainer,
                                         PlannerClient& client,
                                         uint64_t attempt, uint64_t step) {
  const absl::StatusOr<v1::Plan> plan =
      client.GetPlan(trainer.Key(attempt, step));
  if (!plan.ok()) return plan.status();
  const v1::PlanReport& report = plan->report();
  nlohmann::ordered_json object = {
      {"sealed",
       absl::AsciiStrToLower(absl::StripPrefix(
           v1::PlanOrigin_Name(plan->identity().origin()), "PLAN_ORIGIN_"))},
      {"gap", report.gap()},
      {"bubble", report.bubble_ratio()},
      {"predicted_s", report.makespan_ns() * 1e-9},
      {"search_ms", report.search_ns() * 1e-6},
      {"check_ms", report.check_ns() * 1e-6},
  };
  if (absl::GetFlag(FLAGS_compare)) {
    v1::CompareStrategiesRequest request;
    request.set_job(trainer.job.name());
    *request.mutable_batch() = trainer.BatchOf(step);
    for (const char* name : kBaselines) request.add_strategies(name);
    const absl::StatusOr<v1::CompareStrategiesResponse> response =
        client.CompareStrategies(request);
    if (!response.ok()) return response.status();
    for (const v1::StrategyOutcome& outcome : response->outcomes()) {
      if (!outcome.error().empty()) continue;
      object[absl::StrCat("gain_over_", outcome.strategy())] =
          static_cast<double>(outcome.report().makespan_ns()) /
              report.makespan_ns() -
          1;
    }
  }
  return object.dump();
}

absl::Status Submit(const Trainer& trainer, const ControlSocket& parent) {
  std::string layout_digest;
  absl::StatusOr<PlannerClient> client = Connect();
  absl::StatusOr<uint64_t> attempt =
      client.ok() ? Register(trainer, *client, layout_digest) : client.status();
  if (!attempt.ok()) {
    Fail(parent, "submitter", attempt.status());
    return attempt.status();
  }

  std::mutex mutex;
  std::condition_variable changed;
  uint64_t submitted = 0;  // steps; more than there are: the run is over
  uint64_t described = 0;  // steps; more than there are: no more will be
  const auto submit = [&](uint64_t step) -> absl::Status {
    v1::SubmitStepRequest request;
    *request.mutable_key() = trainer.Key(*attempt, step);
    request.set_layout_digest(layout_digest);
    *request.mutable_batch() = trainer.BatchOf(step);
    request.set_seed(step);
    const int needed_in_ms = absl::GetFlag(FLAGS_needed_in_ms);
    request.mutable_needed_in()->set_seconds(needed_in_ms / 1000);
    request.mutable_needed_in()->set_nanos(needed_in_ms % 1000 * 1000000);
    ControlMessage message;
    message.kind = ControlMessage::kSubmitted;
    message.step = step;
    message.value = *attempt;
    message.time_ns = SteadyNowNs();
    if (auto response = client->SubmitStep(request); !response.ok()) {
      return response.status();
    }
    {
      const std::lock_guard<std::mutex> lock(mutex);
      submitted = std::max(submitted, step + 1);
    }
    changed.notify_all();
    return parent.Send(message);
  };

  // Reports go over a thread and channel of their own: a comparison of
  // baselines must not hold up the next step's submission, unless it falls
  // behind.
  absl::Status report_status;
  const auto set_described = [&](uint64_t steps) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      described = steps;
    }
    changed.notify_all();
  };
  const auto describe_steps = [&] {
    absl::StatusOr<PlannerClient> report_client = Connect();
    if (!report_client.ok()) {
      report_status = report_client.status();
      return;
    }
    for (uint64_t step = 0; step < trainer.steps; ++step) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return submitted > step; });
        if (submitted > trainer.steps) return;
      }
      const absl::StatusOr<std::string> line =
          DescribeStep(trainer, *report_client, *attempt, step);
      ControlMessage message;
      message.step = step;
      if (line.ok()) {
        message.kind = ControlMessage::kReport;
        message.SetText(*line);
      } else {
        message.SetText(absl::StrCat("submitter: ", line.status().ToString()));
      }
      if (!parent.Send(message).ok() || !line.ok()) return;
      set_described(step + 1);
    }
  };
  std::thread reporter([&] {
    describe_steps();
    set_described(trainer.steps + 1);
  });
  absl::Status status;
  const uint64_t ahead = absl::GetFlag(FLAGS_ahead);
  for (uint64_t step = 0; step < std::min(ahead, trainer.steps); ++step) {
    if (status = submit(step); !status.ok()) break;
  }
  while (status.ok()) {
    const absl::StatusOr<ControlMessage> done = parent.Receive();
    if (!done.ok()) break;  // the run is over
    {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock,
                   [&] { return described + kMostUndescribed > done->step; });
    }
    if (done->step + ahead < trainer.steps) status = submit(done->step + ahead);
  }
  if (!status.ok()) Fail(parent, "submitter", status);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    submitted = trainer.steps + 1;
  }
  changed.notify_all();
  reporter.join();
  return status.ok() ? report_status : status;
}

// ---- The parent: what collectives do in a real trainer ---------------------

struct StepState {
  int64_t submitted_ns = 0;
  int64_t last_held_ns = 0;
  int held = 0;
  int done = 0;
  uint64_t min_digest = ~uint64_t{0};
  uint64_t max_digest = 0;
  uint64_t step_ns = 0;
  int64_t messages = 0;
  std::string report;
  bool started = false;
  bool printed = false;
};

class Coordinator {
 public:
  Coordinator(const Trainer& trainer, ControlSocket submitter,
              std::vector<ControlSocket> fetch, std::vector<ControlSocket> run)
      : trainer_(trainer),
        submitter_(submitter),
        fetch_(std::move(fetch)),
        run_(std::move(run)),
        steps_(trainer.steps) {}

  absl::Status Run() {
    if (const std::string path = absl::GetFlag(FLAGS_json_log); !path.empty()) {
      json_log_.open(path);
      if (!json_log_) {
        return absl::PermissionDeniedError(
            absl::StrCat(path, ": cannot be written"));
      }
    }
    if (absl::GetFlag(FLAGS_header)) std::cout << Header() << std::endl;
    std::vector<pollfd> fds = {{submitter_.fd(), POLLIN, 0}};
    for (const ControlSocket& s : fetch_) fds.push_back({s.fd(), POLLIN, 0});
    for (const ControlSocket& s : run_) fds.push_back({s.fd(), POLLIN, 0});
    while (next_print_ < trainer_.steps) {
      constexpr int kSilenceMs = 120000;
      if (poll(fds.data(), fds.size(), kSilenceMs) == 0) {
        return absl::DeadlineExceededError(
            absl::StrCat("nothing happened for ", kSilenceMs / 1000,
                         " s in step ", next_print_));
      }
      for (size_t i = 0; i < fds.size(); ++i) {
        if (fds[i].revents == 0) continue;
        const absl::StatusOr<ControlMessage> message =
            ControlSocket(fds[i].fd).Receive();
        if (!message.ok()) {
          return absl::UnavailableError("a process of the trainer died");
        }
        if (absl::Status status = Handle(*message); !status.ok()) return status;
      }
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Handle(const ControlMessage& message) {
    if (message.kind == ControlMessage::kFailed) {
      return absl::InternalError(message.text);
    }
    if (message.step >= trainer_.steps) {
      return absl::InternalError("a message about a step that does not exist");
    }
    StepState& step = steps_[message.step];
    switch (message.kind) {
      case ControlMessage::kSubmitted:
        step.submitted_ns = message.time_ns;
        return SendAll(fetch_, message);
      case ControlMessage::kHeld:
        ++step.held;
        step.last_held_ns = std::max(step.last_held_ns, message.time_ns);
        step.min_digest = std::min(step.min_digest, message.value);
        step.max_digest = std::max(step.max_digest, message.value);
        return StartNext();
      case ControlMessage::kDone: {
        ++step.done;
        step.step_ns = std::max(step.step_ns, message.value);
        step.messages += message.messages;
        if (step.done < trainer_.ranks) return absl::OkStatus();
        if (absl::Status status = submitter_.Send(message); !status.ok()) {
          return status;
        }
        if (absl::Status status = StartNext(); !status.ok()) return status;
        return PrintReady();
      }
      case ControlMessage::kReport:
        step.report = message.text;
        return PrintReady();
      default:
        return absl::InternalError("a message of no known kind");
    }
  }

  static absl::Status SendAll(const std::vector<ControlSocket>& sockets,
                              const ControlMessage& message) {
    for (const ControlSocket& socket : sockets) {
      if (absl::Status status = socket.Send(message); !status.ok()) {
        return status;
      }
    }
    return absl::OkStatus();
  }

  // Starts the next step when every rank has finished the one before and holds
  // the same program.
  absl::Status StartNext() {
    if (next_start_ >= trainer_.steps) return absl::OkStatus();
    StepState& step = steps_[next_start_];
    if (step.held < trainer_.ranks) return absl::OkStatus();
    if (next_start_ > 0 && steps_[next_start_ - 1].done < trainer_.ranks) {
      return absl::OkStatus();
    }
    if (step.min_digest != step.max_digest) {
      return absl::InternalError(
          absl::StrCat("step ", next_start_, ": ranks hold different plans"));
    }
    ControlMessage message;
    message.kind = ControlMessage::kRun;
    message.step = next_start_++;
    return SendAll(run_, message);
  }

  absl::Status PrintReady() {
    while (next_print_ < trainer_.steps) {
      const StepState& step = steps_[next_print_];
      if (step.done < trainer_.ranks || step.report.empty()) break;
      nlohmann::ordered_json row = {
          {"job", trainer_.job.name()},
          {"step", next_print_},
          {"plan_ms", (step.last_held_ns - step.submitted_ns) * 1e-6},
          {"walked_s", step.step_ns / absl::GetFlag(FLAGS_time_scale) * 1e-9},
          {"messages", step.messages},
      };
      row.update(nlohmann::ordered_json::parse(step.report, nullptr,
                                               /*allow_exceptions=*/false));
      if (json_log_.is_open()) json_log_ << row.dump() << std::endl;
      std::cout << Row(row) << std::endl;
      ++next_print_;
    }
    return absl::OkStatus();
  }

  // The line of a step under Header().
  static std::string Row(const nlohmann::ordered_json& row) {
    std::string line = absl::StrFormat(
        "%-14s %4d %9.1f ms  %-15s %5.1f %% %6.1f %% %8.2f s %8.2f s",
        row.value("job", ""), row.value("step", 0), row.value("plan_ms", 0.0),
        row.value("sealed", ""), row.value("gap", 0.0) * 100,
        row.value("bubble", 0.0) * 100, row.value("predicted_s", 0.0),
        row.value("walked_s", 0.0));
    if (!absl::GetFlag(FLAGS_compare)) return line;
    for (const char* name : kBaselines) {
      const auto gain = row.find(absl::StrCat("gain_over_", name));
      absl::StrAppend(&line, gain == row.end()
                                 ? absl::StrFormat(" %18s", "-")
                                 : absl::StrFormat(" %+16.1f %%",
                                                   gain->get<double>() * 100));
    }
    return line;
  }

  static std::string Header() {
    std::string line = absl::StrFormat(
        "%-14s %4s %12s  %-15s %7s %8s %10s %10s", "job", "step",
        "plan latency", "sealed", "gap", "bubble", "predicted", "walked");
    if (!absl::GetFlag(FLAGS_compare)) return line;
    for (const char* name : kBaselines) {
      absl::StrAppendFormat(&line, " %18s", absl::StrCat("> ", name));
    }
    return line;
  }

  const Trainer& trainer_;
  std::ofstream json_log_;
  const ControlSocket submitter_;
  const std::vector<ControlSocket> fetch_;
  const std::vector<ControlSocket> run_;
  std::vector<StepState> steps_;
  uint64_t next_start_ = 0;
  uint64_t next_print_ = 0;
};

// ---- Processes -------------------------------------------------------------

// A connected pair of sockets: .first for the parent.
absl::StatusOr<std::pair<int, int>> SocketPair(int type) {
  int ends[2];
  if (socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, ends) != 0) {
    return absl::ResourceExhaustedError("cannot make a socket pair");
  }
  return std::pair(ends[0], ends[1]);
}

// Runs `body` in a child that dies with its parent and keeps only `own` of
// `all` sockets open, so that the end of a process is seen by the others.
template <typename Body>
pid_t Spawn(const std::set<int>& all, const std::set<int>& own, Body body) {
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child != 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  for (const int fd : all) {
    if (!own.contains(fd)) close(fd);
  }
  const int code = body();
  std::cout.flush();
  _exit(code);
}

absl::Status RunTrainer(const Trainer& trainer) {
  const int n = trainer.ranks;
  std::set<int> all;
  const auto make = [&](int type) -> absl::StatusOr<std::pair<int, int>> {
    absl::StatusOr<std::pair<int, int>> ends = SocketPair(type);
    if (ends.ok()) all.insert({ends->first, ends->second});
    return ends;
  };
  std::vector<std::vector<int>> peers(n, std::vector<int>(n, -1));
  for (int a = 0; a < n; ++a) {
    for (int b = a + 1; b < n; ++b) {
      const auto ends = make(SOCK_STREAM);
      if (!ends.ok()) return ends.status();
      peers[a][b] = ends->first;
      peers[b][a] = ends->second;
    }
  }
  const auto submitter = make(SOCK_SEQPACKET);
  if (!submitter.ok()) return submitter.status();
  std::vector<std::pair<int, int>> fetch(n);
  std::vector<std::pair<int, int>> run(n);
  for (int rank = 0; rank < n; ++rank) {
    const auto fetch_ends = make(SOCK_SEQPACKET);
    const auto run_ends = make(SOCK_SEQPACKET);
    if (!fetch_ends.ok() || !run_ends.ok()) {
      return absl::ResourceExhaustedError("cannot make a socket pair");
    }
    fetch[rank] = *fetch_ends;
    run[rank] = *run_ends;
  }

  // Every fork comes before the first use of gRPC, which does not survive one.
  std::vector<pid_t> children;
  children.push_back(Spawn(all, {submitter->second}, [&] {
    return Submit(trainer, ControlSocket(submitter->second)).ok() ? 0 : 1;
  }));
  for (int rank = 0; rank < n; ++rank) {
    std::set<int> own = {fetch[rank].second, run[rank].second};
    own.insert(peers[rank].begin(), peers[rank].end());
    children.push_back(Spawn(all, own, [&] {
      return RankMain(trainer, rank, ControlSocket(fetch[rank].second),
                      ControlSocket(run[rank].second), peers[rank]);
    }));
  }
  std::vector<ControlSocket> fetch_sockets;
  std::vector<ControlSocket> run_sockets;
  std::set<int> own = {submitter->first};
  for (int rank = 0; rank < n; ++rank) {
    fetch_sockets.emplace_back(fetch[rank].first);
    run_sockets.emplace_back(run[rank].first);
    own.insert({fetch[rank].first, run[rank].first});
  }
  for (const int fd : all) {
    if (!own.contains(fd)) close(fd);
  }
  absl::Status status = Coordinator(trainer, ControlSocket(submitter->first),
                                    fetch_sockets, run_sockets)
                            .Run();
  // The run is over: the children see their sockets close and end.
  for (const int fd : own) close(fd);
  for (const pid_t child : children) {
    if (!status.ok()) kill(child, SIGKILL);
    int wait_status = 0;
    waitpid(child, &wait_status, 0);
    if (status.ok() && wait_status != 0) {
      status = absl::InternalError("a process of the trainer failed");
    }
  }
  return status;
}

absl::StatusOr<Trainer> ReadTrainer() {
  Trainer trainer;
  absl::StatusOr<v1::Job> job =
      ReadTextProto<v1::Job>(absl::GetFlag(FLAGS_job_file));
  if (!job.ok()) return job.status();
  trainer.job = *std::move(job);
  const std::pair<std::vector<std::string>, std::vector<v1::BatchMetadata>*>
      lists[] = {{absl::GetFlag(FLAGS_batch_files), &trainer.batches},
                 {absl::GetFlag(FLAGS_sample_files), &trainer.samples}};
  for (const auto& [paths, batches] : lists) {
    for (const std::string& path : paths) {
      absl::StatusOr<v1::BatchMetadata> batch =
          ReadTextProto<v1::BatchMetadata>(path);
      if (!batch.ok()) return batch.status();
      batches->push_back(*std::move(batch));
    }
  }
  if (trainer.batches.empty()) {
    return absl::InvalidArgumentError("--batch_files: names no file");
  }
  trainer.ranks = trainer.job.parallelism().pipeline_parallel();
  if (trainer.ranks < 1 || trainer.ranks > 64) {
    return absl::InvalidArgumentError(
        absl::StrCat("parallelism.pipeline_parallel: ", trainer.ranks,
                     ": the stand-in runs 1 to 64 ranks"));
  }
  const std::pair<const char*, double> positive[] = {
      {"steps", absl::GetFlag(FLAGS_steps)},
      {"ahead", absl::GetFlag(FLAGS_ahead)},
      {"time_scale", absl::GetFlag(FLAGS_time_scale)}};
  for (const auto& [flag, value] : positive) {
    // Written so that NaN fails too.
    if (!(value > 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag, ": ", value, ", must be above 0"));
    }
  }
  trainer.steps = absl::GetFlag(FLAGS_steps);
  return trainer;
}

}  // namespace
}  // namespace pipeweaver::client

int main(int argc, char** argv) {
  pipeweaver::SetHelp(
      "walks a job's steps with the planner's programs, sleeping in place of "
      "kernels",
      "trainer_main.cc");
  const std::vector<char*> arguments = absl::ParseCommandLine(argc, argv);
  if (arguments.size() > 1) {
    std::cerr << arguments[1] << ": not a flag\n";
    return 2;
  }
  const absl::StatusOr<pipeweaver::client::Trainer> trainer =
      pipeweaver::client::ReadTrainer();
  if (!trainer.ok()) {
    std::cerr << trainer.status().message() << "\n";
    return 2;
  }
  const absl::Status status = pipeweaver::client::RunTrainer(*trainer);
  if (!status.ok()) {
    std::cerr << trainer->job.name() << ": " << status << "\n";
    return 1;
  }
  return 0;
}
