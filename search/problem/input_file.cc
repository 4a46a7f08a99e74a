// Input files, plain or gzip; see input_file.h.

#include "search/problem/input_file.h"

#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "search/problem/field_error.h"

namespace pipeweaver::search {
namespace {

constexpr size_t kBlockBytes = 1 << 18;
constexpr int kGzipOnly = 15 + 16;  // inflateInit2: largest window, gzip header

absl::Status TooLarge(absl::string_view what, int64_t most_bytes) {
  return FieldError(what, absl::StrCat("over ", most_bytes, " bytes"),
                    absl::StrCat("at most ", most_bytes, " bytes unpacked"));
}

absl::Status Unreadable(const std::string& path, int code) {
  return FieldError(path,
                    absl::StrCat("not readable (", std::strerror(code), ")"),
                    "must be a file that can be read");
}

}  // namespace

absl::StatusOr<std::string> Gunzip(absl::string_view packed,
                                   int64_t most_bytes) {
  z_stream stream;
  std::memset(&stream, 0, sizeof(stream));
  if (inflateInit2(&stream, kGzipOnly) != Z_OK) {
    return absl::ResourceExhaustedError("no memory to unpack gzip data");
  }
  const std::unique_ptr<z_stream, int (*)(z_stream*)> closer(&stream,
                                                             inflateEnd);
  std::string out;
  std::string block(kBlockBytes, '\0');
  size_t given = 0;
  bool member_ended = false;
  while (true) {
    if (stream.avail_in == 0 && given < packed.size()) {
      const size_t take = std::min(packed.size() - given, kBlockBytes);
      stream.next_in =
          reinterpret_cast<Bytef*>(const_cast<char*>(packed.data() + given));
      stream.avail_in = static_cast<uInt>(take);
      given += take;
    }
    if (member_ended) {
      if (stream.avail_in == 0) return out;
      if (inflateReset(&stream) != Z_OK) break;
      member_ended = false;
    }
    stream.next_out = reinterpret_cast<Bytef*>(block.data());
    stream.avail_out = static_cast<uInt>(block.size());
    const int code = inflate(&stream, Z_NO_FLUSH);
    const size_t produced = block.size() - stream.avail_out;
    if (static_cast<int64_t>(out.size() + produced) > most_bytes) {
      return TooLarge("gzip data", most_bytes);
    }
    out.append(block, 0, produced);
    if (code == Z_STREAM_END) {
      member_ended = true;
    } else if (code != Z_OK) {
      break;
    }
  }
  return FieldError("gzip data",
                    stream.msg != nullptr ? stream.msg : "cut short",
                    "a complete gzip file");
}

absl::StatusOr<std::string> ReadInputFile(const std::string& path,
                                          int64_t most_bytes) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(
      std::fopen(path.c_str(), "rb"), std::fclose);
  if (file == nullptr) return Unreadable(path, errno);
  std::string content;
  std::string block(kBlockBytes, '\0');
  while (true) {
    const size_t got = std::fread(block.data(), 1, block.size(), file.get());
    content.append(block, 0, got);
    if (static_cast<int64_t>(content.size()) > most_bytes) {
      return TooLarge(path, most_bytes);
    }
    if (got < block.size()) break;
  }
  if (std::ferror(file.get()) != 0) return Unreadable(path, errno);
  if (absl::EndsWith(path, ".gz")) return Gunzip(content, most_bytes);
  return content;
}

}  // namespace pipeweaver::search
