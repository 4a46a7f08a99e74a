// Server configurations: any text is refused with a reason, or completes to a
// configuration that completes to itself.

#include <cstdint>
#include <string>

#include "semu/base/check.h"
#include "server/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace server = pipeweaver::server;
  const std::string text(reinterpret_cast<const char*>(data), size);
  auto config = server::ParseConfig(text, "config");
  if (config.ok()) config = server::CompleteConfig(*std::move(config));
  if (!config.ok()) {
    PW_CHECK(!config.status().message().empty());
    return 0;
  }
  const auto again = server::CompleteConfig(*config);
  PW_CHECK(again.ok());
  PW_CHECK(again->SerializeAsString() == config->SerializeAsString());
  return 0;
}
