// One parallel region for a whole chain of phases: a phase begins when every item of the one before it is done.
#pragma once
#include <sched.h>
#include <stdint.h>

#include "parallel.h"

namespace HFS_ISA {

// Run work.run(phase, item) for phases 0, 1, ... and items [0, work.items(phase)), phase by phase. `claims` holds as many
// zeros as the largest phase has items; one thread needs none.
//
// A thread takes the items of its share first, so that a group of tokens stays in the cache of one core from phase to
// phase, and then what others have not begun. Nobody waits for a thread that is not there: a team of any size, one
// included, comes to the end. Forking once instead of once per phase saves the start of a team dozens of times.
template <typename Work>
static void run_phases(int phases, int threads, int32_t* claims, Work& work) {
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
        int phases, threads;
        int32_t* claims;  // of each item, one more than the last phase that began it
        int32_t joined;
        int64_t done;
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
        bool claim(int phase, int64_t item) {
            int32_t last = __atomic_load_n(&claims[item], __ATOMIC_RELAXED);
            return last <= phase && __atomic_compare_exchange_n(&claims[item], &last, phase + 1, false, __ATOMIC_RELAXED,
                                                                __ATOMIC_RELAXED);
        }
        static void run(void* self) {
            Job* job = (Job*)self;
            const int64_t me = __atomic_fetch_add(&job->joined, 1, __ATOMIC_RELAXED) % job->threads;
            int64_t first = 0;
            for (int phase = 0; phase < job->phases; phase++) {
                const int64_t items = job->work->items(phase), begin = items * me / job->threads;
                job->wait_for(first);
                for (int64_t k = 0; k < items; k++) {
                    const int64_t item = begin + k < items ? begin + k : begin + k - items;
                    if (!job->claim(phase, item)) continue;
                    job->work->run(phase, item);
                    __atomic_fetch_add(&job->done, 1, __ATOMIC_RELEASE);
                }
                first += items;
            }
        }
    } job = {&work, phases, threads, claims, 0, 0};
    fork(&Job::run, &job, (unsigned)threads, 0);
}

}  // namespace HFS_ISA
