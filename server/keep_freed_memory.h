// A setting of the process's allocator.

#ifndef SERVER_KEEP_FREED_MEMORY_H_
#define SERVER_KEEP_FREED_MEMORY_H_

namespace pipeweaver::server {

// Memory that is freed stays with the process up to 64 MiB an arena of the
// allocator, large blocks too: each step needs some 10 MiB, and to get them
// from the kernel page by page takes milliseconds. For main to call, before
// threads start.
void KeepFreedMemory();

}  // namespace pipeweaver::server

#endif  // SERVER_KEEP_FREED_MEMORY_H_
