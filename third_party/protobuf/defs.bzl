"""C++ from .proto files with Debian's protoc and gRPC plugin."""

_PROTOC = "/usr/bin/protoc"
_GRPC_PLUGIN = "/usr/bin/grpc_cpp_plugin"

def _generate(name, src, imports, extension, flags):
    stem = src[:-len(".proto")]
    native.genrule(
        name = name,
        srcs = [src] + imports,
        outs = [stem + extension + ".h", stem + extension + ".cc"],
        cmd = _PROTOC + " --proto_path=proto " + flags + " $(location " + src + ")",
    )
    return stem + extension

def cc_proto_library(name, src, imports = [], deps = []):
    """Messages of one .proto file, included as "pipeweaver/v1/<stem>.pb.h".

    Args:
      name: the target.
      src: the .proto file.
      imports: the .proto files that it imports.
      deps: their targets.
    """
    out = _generate(name + "_gen", src, imports, ".pb", "--cpp_out=$(GENDIR)/proto")
    native.cc_library(
        name = name,
        srcs = [out + ".cc"],
        hdrs = [out + ".h"],
        strip_include_prefix = "/proto",
        deps = deps + ["@system//:protobuf"],
    )

def cc_grpc_library(name, src, imports = [], deps = []):
    """Messages and service of one .proto file.

    Args:
      name: the target.
      src: the .proto file.
      imports: the .proto files that it imports.
      deps: their targets.
    """
    cc_proto_library(name = name + "_messages", src = src, imports = imports, deps = deps)
    out = _generate(
        name + "_gen",
        src,
        imports,
        ".grpc.pb",
        "--plugin=protoc-gen-grpc=" + _GRPC_PLUGIN + " --grpc_out=generate_mock_code=false:$(GENDIR)/proto",
    )
    native.cc_library(
        name = name,
        srcs = [out + ".cc"],
        hdrs = [out + ".h"],
        strip_include_prefix = "/proto",
        deps = deps + [
            ":" + name + "_messages",
            "@system//:grpc",
        ],
    )
