// One parallel region for a whole chain of phases: a phase begins when every item of the one before it is done.
#pragma once
#include <sched.h>
#include <stdint.h>

#include "parallel.h"

namespace HFS_ISA {

// Run work.run(phase, item) for phases 0, 1, ... and items [0, work.items(phase)), phase by phase.
//
// Items are handed out in order as threads get free. Nobody waits for a thread that is not there: a team of any size,
// one included, comes to the end. Forking once instead of once per phase saves the start of a team dozens of times.
template <typename Work>
static void run_phases(int phases, int threads, Work& work) {
    hfs_parallel_fn fork = threads > 1 ? hfs_parallel() : nullptr;
    if (!fork) {
        for (int phase = 0; phase < phases; phase++) {
            const int64_t items = work.items(phase);
            for (int64_t i = 0; i < items; i++) work.run(phase, i);
        }
        return;
    }
    struct Job {
        Work* work;
        int phases;
        int64_t next, done;
        void wait_for(int64_t items) {
            for (int spins = 0; __atomic_load_n(&done, __ATOMIC_ACQUIRE) < items; spins++) {
                if (spins < 2000) {
#if defined(__x86_64__)
                    __builtin_ia32_pause();
#endif
                } else {
                    sched_yield();  // more threads than cores: let the one that works have this core
                }
            }
        }
        static void run(void* self) {
            Job* job = (Job*)self;
            int64_t first = 0, ticket = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
            for (int phase = 0; phase < job->phases; phase++) {
                const int64_t end = first + job->work->items(phase);
                while (ticket < end) {
                    job->wait_for(first);
                    job->work->run(phase, ticket - first);
                    __atomic_fetch_add(&job->done, 1, __ATOMIC_RELEASE);
                    ticket = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
                }
                first = end;
            }
        }
    } job = {&work, phases, 0, 0};
    fork(&Job::run, &job, (unsigned)threads, 0);
}

}  // namespace HFS_ISA
