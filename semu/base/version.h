// The version of this release: of the server, its tools and the Python package
// (client_agents/python/pyproject.toml), which are released together.

#ifndef SEMU_BASE_VERSION_H_
#define SEMU_BASE_VERSION_H_

namespace pipeweaver {

// As in semver.org.
inline constexpr char kVersion[] = "0.1.0";

}  // namespace pipeweaver

#endif  // SEMU_BASE_VERSION_H_
