#include "server/keep_freed_memory.h"

#include <malloc.h>

namespace pipeweaver::server {

void KeepFreedMemory() {
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
}

}  // namespace pipeweaver::server
