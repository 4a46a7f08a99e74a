// See config.h.

#include "server/config.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <system_error>
#include <thread>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "profiler/profile_file.h"
#include "proto/text/text_proto.h"
#include "semu/base/status_macros.h"
#include "semu/model/job_proto.h"
#include "server/auth.h"

namespace pipeweaver::server {
namespace {

// By its characters: a name, an IPv4 address, or an IPv6 address in brackets,
// where that is allowed.
bool IsHost(absl::string_view host, bool brackets_allowed) {
  const bool bracketed = brackets_allowed && absl::ConsumePrefix(&host, "[") &&
                         absl::ConsumeSuffix(&host, "]");
  return !host.empty() && absl::c_all_of(host, [bracketed](char c) {
    return absl::ascii_isalnum(c) || c == '.' || c == '-' || c == '_' ||
           (bracketed && (c == ':' || c == '%'));
  });
}

// `grpc_or_redis`: else the metrics page's listener, which takes neither
// sockets by path nor IPv6.
absl::Status CheckAddress(absl::string_view field, absl::string_view address,
                          bool grpc_or_redis) {
  if (grpc_or_redis && absl::StartsWith(address, "unix:")) {
    if (address.size() > 5) return absl::OkStatus();
  } else {
    const size_t colon = address.rfind(':');
    int port = -1;
    if (colon != absl::string_view::npos &&
        IsHost(address.substr(0, colon), grpc_or_redis) &&
        absl::SimpleAtoi(address.substr(colon + 1), &port) && port >= 0 &&
        port <= 65535) {
      return absl::OkStatus();
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      field, ": '", address, "', must be host:port",
      grpc_or_redis ? " or unix:path; an IPv6 host stands in brackets"
                    : " or none; IPv6 is not served"));
}

// gRPC reads a listen address as a URI, in which a path may be escaped or
// follow an authority.
absl::Status CheckUnixPath(absl::string_view field, absl::string_view address) {
  absl::string_view path = address;
  if (!absl::ConsumePrefix(&path, "unix:")) return absl::OkStatus();
  if (absl::ConsumePrefix(&path, "//") && !absl::StartsWith(path, "/")) {
    return absl::InvalidArgumentError(absl::StrCat(
        field, ": '", address, "', must have a path from / after unix://"));
  }
  if (absl::StrContains(path, '%')) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": '", address, "', must have no % in its path"));
  }
  return absl::OkStatus();
}

absl::Status CheckRange(absl::string_view field, int64_t value, int64_t min,
                        int64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, ", must be ", min, " .. ", max));
}

absl::Status CheckPem(absl::string_view field, const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  if (!in) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": cannot read '", path, "'"));
  }
  if (!absl::StrContains(text.str(), "-----BEGIN ")) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": '", path, "' is not a PEM file"));
  }
  return absl::OkStatus();
}

absl::Status CheckCertificates(absl::string_view field,
                               const std::string& path) {
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(
      SSL_CTX_new(TLS_server_method()), &SSL_CTX_free);
  const bool loaded =
      SSL_CTX_load_verify_file(context.get(), path.c_str()) == 1;
  ERR_clear_error();
  if (loaded) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": '", path, "' holds no certificate"));
}

// The certificate and the key that it was made for.
absl::Status CheckKeyPair(const std::string& cert_file,
                          const std::string& key_file) {
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(
      SSL_CTX_new(TLS_server_method()), &SSL_CTX_free);
  absl::Status status;
  if (SSL_CTX_use_certificate_chain_file(context.get(), cert_file.c_str()) !=
      1) {
    status = absl::InvalidArgumentError(
        absl::StrCat("cert_file: '", cert_file, "' holds no certificate"));
  } else if (SSL_CTX_use_PrivateKey_file(context.get(), key_file.c_str(),
                                         SSL_FILETYPE_PEM) != 1) {
    status = absl::InvalidArgumentError(absl::StrCat(
        "key_file: '", key_file,
        "' does not hold the key of the certificate in cert_file '", cert_file,
        "'"));
  }
  ERR_clear_error();
  return status;
}

absl::Status CheckTls(const v1::ServerConfig& config) {
  if (config.cert_file().empty() != config.key_file().empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("cert_file: '", config.cert_file(), "', key_file: '",
                     config.key_file(), "', must be set both or neither"));
  }
  if (config.cert_file().empty()) {
    if (config.client_ca_file().empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("client_ca_file: '", config.client_ca_file(),
                     "', needs cert_file and key_file"));
  }
  PW_RETURN_IF_ERROR(CheckPem("cert_file", config.cert_file()));
  PW_RETURN_IF_ERROR(CheckPem("key_file", config.key_file()));
  PW_RETURN_IF_ERROR(CheckKeyPair(config.cert_file(), config.key_file()));
  if (config.client_ca_file().empty()) return absl::OkStatus();
  PW_RETURN_IF_ERROR(CheckPem("client_ca_file", config.client_ca_file()));
  return CheckCertificates("client_ca_file", config.client_ca_file());
}

// The store makes the file, not its folder.
absl::Status CheckStoreFile(const std::string& path) {
  const auto invalid = [&path](absl::string_view why) {
    return absl::InvalidArgumentError(
        absl::StrCat("subgraph_store_file: '", path, "': ", why));
  };
  std::error_code error;
  if (std::filesystem::exists(path, error)) {
    return std::filesystem::is_regular_file(path, error)
               ? absl::OkStatus()
               : invalid("is not a regular file");
  }
  std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (folder.empty()) folder = ".";
  if (!std::filesystem::is_directory(folder, error)) {
    return invalid("its folder does not exist");
  }
  if (access(folder.c_str(), W_OK) != 0) {
    return invalid("its folder cannot be written to");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<v1::ServerConfig> ParseConfig(absl::string_view text,
                                             absl::string_view path) {
  v1::ServerConfig config;
  PW_RETURN_IF_ERROR(ParseTextProto(text, path, config));
  return config;
}

absl::StatusOr<v1::ServerConfig> CompleteConfig(v1::ServerConfig config) {
  if (config.listen_address().empty()) {
    config.set_listen_address("127.0.0.1:7411");
  }
  PW_RETURN_IF_ERROR(
      CheckAddress("listen_address", config.listen_address(), true));
  PW_RETURN_IF_ERROR(CheckUnixPath("listen_address", config.listen_address()));
  if (config.metrics_address().empty()) {
    config.set_metrics_address("127.0.0.1:7412");
  }
  if (config.metrics_address() != "none") {
    PW_RETURN_IF_ERROR(
        CheckAddress("metrics_address", config.metrics_address(), false));
    if (config.metrics_address() == config.listen_address() &&
        !absl::EndsWith(config.metrics_address(), ":0")) {
      return absl::InvalidArgumentError(
          absl::StrCat("metrics_address: '", config.metrics_address(),
                       "', must not be listen_address"));
    }
  }

// Fills in the default where a field is 0, then checks its range.
#define PW_COMPLETE(field, default_value, min, max)           \
  if (config.field() == 0) config.set_##field(default_value); \
  PW_RETURN_IF_ERROR(CheckRange(#field, config.field(), min, max))

  const int cores =
      std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  constexpr int64_t kDayMs = 86'400'000;
  constexpr int64_t kTiB = int64_t{1} << 40;
  PW_COMPLETE(planner_threads, cores, 1, 1024);
  PW_COMPLETE(search_budget_ms, 50, 1, kDayMs);
  PW_COMPLETE(seal_margin_ms, 2, 1, kDayMs);
  PW_COMPLETE(max_steps_per_replica, 8, 1, 1'000'000);
  PW_COMPLETE(max_jobs, 1024, 1, 1'000'000);
  PW_COMPLETE(max_plan_bytes, int64_t{1} << 30, 1 << 20, kTiB);
  PW_COMPLETE(plan_ttl_seconds, 600, 1, kDayMs / 1000);
  PW_COMPLETE(job_ttl_seconds, 7 * kDayMs / 1000, 60, 366 * kDayMs / 1000);
  PW_COMPLETE(max_message_bytes, 16 << 20, 1 << 10, 1 << 30);
  PW_COMPLETE(drain_ms, 10'000, 1, kDayMs);
  PW_COMPLETE(max_job_labels, 50, 1, 10'000);
  PW_COMPLETE(max_queued, 4096, 1, 1'000'000);
  PW_COMPLETE(max_search_ms, 10'000, 1, kDayMs);
  PW_COMPLETE(keepalive_seconds, 60, 1, kDayMs / 1000);
  PW_COMPLETE(transport_memory_bytes, int64_t{1} << 30, 1 << 20, kTiB);
  PW_COMPLETE(subgraph_store_bytes, int64_t{64} << 20, 1 << 20, kTiB);
  PW_COMPLETE(subgraph_store_file_bytes, int64_t{1} << 30, 16 << 20, kTiB);
#undef PW_COMPLETE

  if (!config.subgraph_store_redis().empty()) {
    PW_RETURN_IF_ERROR(CheckAddress("subgraph_store_redis",
                                    config.subgraph_store_redis(),
                                    /*grpc_or_redis=*/true));
  }

  if (!config.subgraph_store_file().empty()) {
    PW_RETURN_IF_ERROR(CheckStoreFile(config.subgraph_store_file()));
  }

  PW_RETURN_IF_ERROR(CheckTls(config));
  if (!config.token_file().empty()) {
    PW_RETURN_IF_ERROR(TokenAuth::FromFile(config.token_file()).status());
  }
  PW_RETURN_IF_ERROR(LoadProfiles(config).status());
  return config;
}

absl::StatusOr<std::vector<LoadedProfile>> LoadProfiles(
    const v1::ServerConfig& config) {
  std::vector<LoadedProfile> loaded;
  for (int i = 0; i < config.profiles_size(); ++i) {
    const v1::JobProfile& entry = config.profiles(i);
    PW_RETURN_IF_ERROR(
        semu::ValidateName(absl::StrCat("profiles[", i, "].job"), entry.job()));
    absl::StatusOr<v1::Profile> profile =
        profiler::ReadProfileFile(entry.file());
    if (!profile.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("profiles[", i, "].file: ", profile.status().message()));
    }
    loaded.push_back({entry.job(), *std::move(profile)});
  }
  return loaded;
}

PlannerCoreOptions CoreOptions(const v1::ServerConfig& config) {
  PlannerCoreOptions options;
  options.planner_threads = config.planner_threads();
  options.max_queued = config.max_queued();
  options.max_jobs = config.max_jobs();
  options.job_ttl = std::chrono::seconds(config.job_ttl_seconds());
  options.search_budget = std::chrono::milliseconds(config.search_budget_ms());
  options.max_search = std::chrono::milliseconds(config.max_search_ms());
  options.seal_margin = std::chrono::milliseconds(config.seal_margin_ms());
  options.steps.max_steps_per_replica = config.max_steps_per_replica();
  options.steps.max_plan_bytes = config.max_plan_bytes();
  options.steps.plan_ttl = std::chrono::seconds(config.plan_ttl_seconds());
  return options;
}

}  // namespace pipeweaver::server
