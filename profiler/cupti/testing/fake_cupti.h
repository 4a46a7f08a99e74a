// Controls of the stand-in for libcupti: what a GPU and other tools would do.

#ifndef PROFILER_CUPTI_TESTING_FAKE_CUPTI_H_
#define PROFILER_CUPTI_TESTING_FAKE_CUPTI_H_

#include <cstdint>

extern "C" {

// Makes every CUPTI call that can fail return this code; 0: none.
void fake_cupti_fail(int result);
// Another tool takes (1) or releases (0) the only subscription.
void fake_cupti_other_subscriber(int present);
// A launch on the calling thread; the kernel ends at once, or with `running`
// only at fake_cupti_finish.
void fake_cupti_launch(const char* name, uint64_t duration_ns, int running);
void fake_cupti_finish();
void fake_cupti_copy(uint64_t duration_ns);
// An API call on the calling thread that launches nothing.
void fake_cupti_ask();
// Whether the library knows its APIs' names; it does at the start.
void fake_cupti_name_apis(int named);
// The next completed buffer reports this many dropped records.
void fake_cupti_drop(uint64_t records);
// Activity kinds enabled now; records written ever; ids on the calling thread's
// stack; buffers requested and not completed.
int fake_cupti_enabled_kinds();
int fake_cupti_records();
int fake_cupti_stack_depth();
int fake_cupti_open_buffers();

}  // extern "C"

#endif  // PROFILER_CUPTI_TESTING_FAKE_CUPTI_H_
