// Integers as 8 little-endian bytes, on any machine.

#ifndef SEMU_BASE_LITTLE_ENDIAN_H_
#define SEMU_BASE_LITTLE_ENDIAN_H_

#include <bit>
#include <cstdint>
#include <cstring>

namespace pipeweaver {

// Writes `value` at `out` and returns where it ends.
inline char* PutLittleEndian64(uint64_t value, char* out) {
  if constexpr (std::endian::native == std::endian::big) {
    value = __builtin_bswap64(value);
  }
  std::memcpy(out, &value, sizeof(value));
  return out + sizeof(value);
}

// Reads what PutLittleEndian64 wrote.
inline uint64_t LittleEndian64(const char* in) {
  uint64_t value = 0;
  std::memcpy(&value, in, sizeof(value));
  if constexpr (std::endian::native == std::endian::big) {
    value = __builtin_bswap64(value);
  }
  return value;
}

}  // namespace pipeweaver

#endif  // SEMU_BASE_LITTLE_ENDIAN_H_
