/* C interface of libpipeweaver_cupti.so, an agent that measures a trainer's
 * kernels through CUPTI from inside its process.
 *
 * Load it with CUDA_INJECTION64_PATH=/path/libpipeweaver_cupti.so, or dlopen it
 * and call pw_cupti_start. The trainer then says where it is: pw_cupti_step at
 * every step boundary, pw_cupti_push and pw_cupti_pop around the work of a
 * layer's pass, on the thread that launches it. Kernel and copy times, summed
 * by step, annotation and kernel name, leave through a ring in shared memory
 * (record_ring.h).
 *
 * Every function may be called from any thread, before pw_cupti_start and after
 * the agent turned itself off: it then does nothing. None of them throws,
 * blocks on the GPU, or ends the process. A forked child's calls do nothing.
 *
 * Environment, read once at the start:
 *   PIPEWEAVER_CUPTI=0              stay off
 *   PIPEWEAVER_CUPTI_RING           file of the ring; default
 *                                   /dev/shm/pipeweaver-cupti-<uid>-<pid>-<time>
 *   PIPEWEAVER_CUPTI_DUTY           steps traced of how many; default 2/100
 *   PIPEWEAVER_CUPTI_BUFFERS        buffers, KiB of each; default 16x2048
 *   PIPEWEAVER_CUPTI_LIBRARY        libcupti to load; default the usual ones.
 *                                   Only set it where there is a GPU: it is not
 *                                   looked for then, and libcupti of CUDA 13.2
 *                                   ends a process without one
 */

#ifndef PROFILER_CUPTI_PIPEWEAVER_CUPTI_H_
#define PROFILER_CUPTI_PIPEWEAVER_CUPTI_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  PW_CUPTI_OFF =
      0, /* not started, or turned off for good: no GPU, no right, no library */
  PW_CUPTI_IDLE = 1,   /* between traced steps */
  PW_CUPTI_ACTIVE = 2, /* tracing */
  PW_CUPTI_YIELDED =
      3, /* another CUPTI client is at work, or pw_cupti_detach was called */
} pw_cupti_state;

/* What the CUDA driver calls at cuInit. Returns 1. */
int InitializeInjection(void);

/* The same for a trainer that loads the library itself; again: does nothing. */
void pw_cupti_start(void);

/* A step begins. Tracing starts and stops here only. */
void pw_cupti_step(int64_t step);

/* Kernels launched by this thread belong to `annotation`, until the pop that
 * matches. Annotations nest; the innermost counts. "pw:module=...,pass=..."
 * names a layer's pass (LayerKey in profile.proto). The text is copied. */
void pw_cupti_push(const char* annotation);
void pw_cupti_pop(void);

/* Gives CUPTI free for another profiler, at once, until pw_cupti_attach.
 * Without it the agent gives way at the next step, and the profiler loses what
 * it traced until then. */
void pw_cupti_detach(void);
void pw_cupti_attach(void);

/* The state; why, as text, into `reason` of `reason_bytes` (may be null). */
pw_cupti_state pw_cupti_status(char* reason, size_t reason_bytes);

/* Ends tracing, writes out what was measured and removes the ring's name: a
 * reader that has the ring open keeps it. Also done when the process exits. */
void pw_cupti_stop(void);

#ifdef __cplusplus
}
#endif

#endif /* PROFILER_CUPTI_PIPEWEAVER_CUPTI_H_ */
