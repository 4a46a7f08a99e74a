// Files of test vectors that tests compare their own output with.

#ifndef SEARCH_TESTING_GOLDEN_FILE_H_
#define SEARCH_TESTING_GOLDEN_FILE_H_

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

namespace pipeweaver::search::testing {

// What stands in the file at `path`. Where PIPEWEAVER_UPDATE names a file,
// `text` is written there instead, and is the answer.
inline std::string GoldenText(const std::string& path,
                              const std::string& text) {
  if (const char* update = std::getenv("PIPEWEAVER_UPDATE");
      update != nullptr) {
    std::ofstream(update) << text;
    return text;
  }
  std::ifstream file(path);
  std::stringstream golden;
  golden << file.rdbuf();
  return golden.str();
}

}  // namespace pipeweaver::search::testing

#endif  // SEARCH_TESTING_GOLDEN_FILE_H_
