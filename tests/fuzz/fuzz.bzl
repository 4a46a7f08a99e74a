"""Fuzz targets that are tests, too."""

def cc_fuzz_target(name, deps):
    """A parser's fuzz target: <name>.cc defines LLVMFuzzerTestOneInput.

    Makes `<name>_test`, which runs the corpus in corpus/<name> and mutations of it
    with any compiler, and `<name>`, a libFuzzer binary, built by name with
    --config=fuzz.

    Args:
      name: the target, and the stem of its source.
      deps: what the source uses.
    """
    native.filegroup(
        name = name + "_corpus",
        srcs = native.glob(["corpus/" + name + "/*"]),
    )
    native.cc_test(
        name = name + "_test",
        size = "small",
        srcs = [name + ".cc", "corpus_main.cc"],
        args = ["tests/fuzz/corpus/" + name],
        data = [":" + name + "_corpus"],
        tags = ["no_tsan"],
        deps = deps,
    )
    native.cc_binary(
        name = name,
        srcs = [name + ".cc"],
        copts = ["-fsanitize=fuzzer"],
        linkopts = ["-fsanitize=fuzzer"],
        # Needs clang: left out of //... builds.
        tags = ["manual"],
        testonly = True,
        deps = deps,
    )
