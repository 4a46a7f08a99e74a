// Runs a fuzz target without a fuzzer, as a test: each file of its corpus, then
// a fixed number of mutations of each, the same in every run.
//
//   TARGET CORPUS_FOLDER [MUTATIONS_PER_FILE]

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void RunOne(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()),
                         input.size());
}

// One to four small changes: a flipped bit, a byte, a cut, a repeated piece.
std::string Mutate(const std::string& input, std::mt19937_64& random) {
  std::string output = input;
  const int changes = 1 + static_cast<int>(random() % 4);
  for (int i = 0; i < changes && !output.empty(); ++i) {
    const size_t at = random() % output.size();
    switch (random() % 5) {
      case 0:
        output[at] = static_cast<char>(output[at] ^ (1 << (random() % 8)));
        break;
      case 1:
        output[at] = static_cast<char>(random());
        break;
      case 2:
        output.erase(at, 1 + random() % 16);
        break;
      case 3:
        output.insert(at, output.substr(random() % output.size(), 16));
        break;
      case 4:
        output.resize(at);
        break;
    }
  }
  return output;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s CORPUS_FOLDER [MUTATIONS_PER_FILE]\n",
                 argv[0]);
    return 2;
  }
  const int mutations = argc > 2 ? std::atoi(argv[2]) : 200;
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
    files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  if (files.empty()) {
    std::fprintf(stderr, "%s: no corpus\n", argv[1]);
    return 1;
  }
  RunOne("");
  std::mt19937_64 random(1);
  for (const std::filesystem::path& file : files) {
    std::ifstream in(file, std::ios::binary);
    const std::string seed((std::istreambuf_iterator<char>(in)), {});
    RunOne(seed);
    for (int i = 0; i < mutations; ++i) RunOne(Mutate(seed, random));
  }
  std::printf("%zu files, %d mutations each\n", files.size(), mutations);
  return 0;
}
