// Bytes of a file, plain or gzip, one block at a time.

#include "semu/base/text_source.h"

#include <sys/stat.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "semu/base/status_macros.h"

namespace pipeweaver {
namespace {

constexpr std::size_t kBlockBytes = 256 << 10;

class FileSource : public TextSource {
 public:
  // Takes over `file`.
  FileSource(std::string path, gzFile file)
      : path_(std::move(path)), file_(file), block_(kBlockBytes) {}
  ~FileSource() override { gzclose(file_); }
  FileSource(const FileSource&) = delete;
  FileSource& operator=(const FileSource&) = delete;

  absl::StatusOr<absl::string_view> NextBlock() override {
    const int bytes =
        gzread(file_, block_.data(), static_cast<unsigned>(block_.size()));
    if (bytes > 0)
      return absl::string_view(block_.data(), static_cast<std::size_t>(bytes));
    int code = Z_OK;
    const char* message = gzerror(file_, &code);
    if (bytes < 0 || code != Z_OK) {
      return absl::DataLossError(absl::StrCat(
          path_, ": ",
          code == Z_BUF_ERROR ? "gzip data breaks off before its end"
                              : message));
    }
    return absl::string_view();
  }

 private:
  const std::string path_;
  gzFile file_;
  std::vector<char> block_;
};

class StringSource : public TextSource {
 public:
  StringSource(std::string text, std::size_t block_bytes)
      : text_(std::move(text)), block_bytes_(block_bytes) {}

  absl::StatusOr<absl::string_view> NextBlock() override {
    const absl::string_view block =
        absl::string_view(text_).substr(position_, block_bytes_);
    position_ += block.size();
    return block;
  }

 private:
  const std::string text_;
  const std::size_t block_bytes_;
  std::size_t position_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TextSource>> OpenTextFile(
    const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) {
    const int code = errno;
    const std::string message = absl::StrCat(path, ": ", std::strerror(code));
    return code == ENOENT ? absl::NotFoundError(message)
                          : absl::InvalidArgumentError(message);
  }
  if (S_ISDIR(info.st_mode))
    return absl::InvalidArgumentError(absl::StrCat(path, ": is a folder"));
  gzFile file = gzopen(path.c_str(), "rb");
  if (file == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", std::strerror(errno)));
  }
  gzbuffer(file, kBlockBytes);
  return std::make_unique<FileSource>(path, file);
}

std::unique_ptr<TextSource> TextFromString(std::string text,
                                           std::size_t block_bytes) {
  return std::make_unique<StringSource>(std::move(text), block_bytes);
}

absl::StatusOr<std::string> ReadTextFile(const std::string& path,
                                         std::size_t max_bytes) {
  PW_ASSIGN_OR_RETURN(const std::unique_ptr<TextSource> source,
                      OpenTextFile(path));
  std::string text;
  while (true) {
    PW_ASSIGN_OR_RETURN(const absl::string_view block, source->NextBlock());
    if (block.empty()) return text;
    if (block.size() > max_bytes - text.size()) {
      return absl::ResourceExhaustedError(
          absl::StrCat(path, ": holds more than ", max_bytes, " bytes"));
    }
    text.append(block.data(), block.size());
  }
}

}  // namespace pipeweaver
