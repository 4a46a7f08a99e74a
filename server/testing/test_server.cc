// See test_server.h.

#include "server/testing/test_server.h"

#include <utility>
#include <vector>

#include "semu/base/check.h"
#include "server/config.h"

namespace pipeweaver::server {

v1::Job SmallJob(const std::string& name, int ranks) {
  v1::Job job;
  job.set_name(name);
  v1::Module* module = job.add_modules();
  module->set_name("text");
  module->set_modality(v1::MODALITY_TEXT);
  v1::LayerGroup* layers = module->add_layers();
  layers->set_kind(v1::LAYER_KIND_TRANSFORMER);
  layers->set_count(2 * ranks);
  layers->set_hidden_size(64);
  layers->set_ffn_size(256);
  layers->set_heads(4);
  layers->set_causal(true);
  v1::LayerGroup* head = module->add_layers();
  head->set_kind(v1::LAYER_KIND_LM_HEAD);
  head->set_count(1);
  head->set_hidden_size(64);
  head->set_vocab_size(1000);
  job.mutable_parallelism()->set_pipeline_parallel(ranks);
  v1::Device* device = job.mutable_device();
  device->set_name("H800-80GB");
  device->set_peak_flops_per_second(989'000'000'000'000);
  device->set_memory_bandwidth_bytes_per_second(3'350'000'000'000);
  device->set_memory_bytes(int64_t{80} << 30);
  for (v1::Link* link : {job.mutable_links()->mutable_tensor_parallel(),
                         job.mutable_links()->mutable_p2p_intra_node(),
                         job.mutable_links()->mutable_p2p_inter_node(),
                         job.mutable_links()->mutable_host()}) {
    link->set_latency_ns(5'000);
    link->set_bandwidth_bytes_per_second(25'000'000'000);
  }
  return job;
}

v1::BatchMetadata SmallBatch(uint32_t tokens) {
  v1::BatchMetadata batch;
  v1::ModuleItems* items = batch.add_microbatches()->add_items();
  items->set_module(0);
  items->add_tokens(tokens);
  return batch;
}

TestServer::TestServer(v1::ServerConfig config) {
  if (config.listen_address().empty()) {
    config.set_listen_address("127.0.0.1:0");
  }
  if (config.metrics_address().empty()) config.set_metrics_address("none");
  if (config.planner_threads() == 0) config.set_planner_threads(2);
  const absl::StatusOr<v1::ServerConfig> complete =
      CompleteConfig(std::move(config));
  PW_CHECK(complete.ok());
  auto server = Server::Start(
      *complete, &planner_,
      [](const search::PlannableJob&, const search::StepPlan& plan,
         const Simulation& simulation,
         const std::atomic<bool>&) -> absl::StatusOr<std::vector<int64_t>> {
        return std::vector<int64_t>(simulation.runs, plan.report.makespan_ns);
      },
      &clock_);
  PW_CHECK(server.ok());
  server_ = *std::move(server);
  grpc::ChannelArguments arguments;
  arguments.SetMaxSendMessageSize(-1);
  arguments.SetMaxReceiveMessageSize(-1);
  channel_ = grpc::CreateCustomChannel(
      server_->address(), grpc::InsecureChannelCredentials(), arguments);
  stub_ = v1::PlannerService::NewStub(channel_);
}

v1::RegisterJobResponse TestServer::Register(const std::string& name,
                                             const std::string& request_id) {
  v1::RegisterJobRequest request;
  request.set_request_id(request_id);
  *request.mutable_job() = SmallJob(name);
  v1::RegisterJobResponse response;
  grpc::ClientContext context;
  PW_CHECK(stub_->RegisterJob(&context, request, &response).ok());
  if (!response.layout_confirmed()) {
    v1::ConfirmLayoutRequest confirm;
    confirm.set_job(name);
    confirm.set_attempt(response.attempt());
    confirm.set_layout_digest(response.layout_digest());
    v1::ConfirmLayoutResponse confirmed;
    grpc::ClientContext confirm_context;
    PW_CHECK(stub_->ConfirmLayout(&confirm_context, confirm, &confirmed).ok());
  }
  return response;
}

v1::SubmitStepRequest TestServer::Submission(
    const std::string& job, const v1::RegisterJobResponse& registered,
    uint64_t step, uint32_t tokens) {
  v1::SubmitStepRequest request;
  request.mutable_key()->set_job(job);
  request.mutable_key()->set_attempt(registered.attempt());
  request.mutable_key()->set_step(step);
  request.set_layout_digest(registered.layout_digest());
  *request.mutable_batch() = SmallBatch(tokens);
  return request;
}

grpc::Status TestServer::Submit(const v1::SubmitStepRequest& request) {
  v1::SubmitStepResponse response;
  grpc::ClientContext context;
  return stub_->SubmitStep(&context, request, &response);
}

}  // namespace pipeweaver::server
