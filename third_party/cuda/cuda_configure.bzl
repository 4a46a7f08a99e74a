"""Finds the CUDA toolkit's CUPTI headers, or makes an empty repository."""

_FOUND = """
package(default_visibility = ["//visibility:public"])

# Headers only: the library is opened at run time, so that nothing here links it.
cc_library(
    name = "cupti_headers",
    hdrs = glob(["include/**/*.h", "include/**/*.hpp"]),
    includes = ["include"],
)
"""

# A constraint that no platform has: what depends on the headers is skipped.
_MISSING = """
package(default_visibility = ["//visibility:public"])

constraint_setting(name = "toolkit")

constraint_value(
    name = "toolkit_found",
    constraint_setting = ":toolkit",
)

cc_library(
    name = "cupti_headers",
    target_compatible_with = [":toolkit_found"],
)
"""

def _cuda_configure_impl(repository_ctx):
    root = repository_ctx.os.environ.get("CUDA_HOME", "/usr/local/cuda")
    header = repository_ctx.path(root + "/include/cupti.h")
    found = header.exists
    if found:
        repository_ctx.symlink(root + "/include", "include")
        repository_ctx.file("BUILD.bazel", _FOUND)
    else:
        repository_ctx.file("BUILD.bazel", _MISSING)
    repository_ctx.file("defs.bzl", "CUDA_FOUND = %s\nCUDA_HOME = \"%s\"\n" % (found, root if found else ""))

cuda_configure = repository_rule(
    implementation = _cuda_configure_impl,
    environ = ["CUDA_HOME"],
    local = True,
)
