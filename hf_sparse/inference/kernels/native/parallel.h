// Threads and scratch memory, shared by all instruction sets.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef void (*hfs_parallel_fn)(void (*)(void*), void*, unsigned, unsigned);

__attribute__((visibility("hidden"))) hfs_parallel_fn hfs_parallel(void);
// At least `count` floats on a 64-byte boundary, belonging to the calling thread until it asks again for the same
// slot (0 to 2); null when there is no memory.
__attribute__((visibility("hidden"))) float* hfs_scratch(int slot, size_t count);

namespace HFS_ISA {

// Call work(i) for i in [0, items). Items are handed out as threads get free, so that one slow core does not hold up
// the others; what an item computes never depends on which thread runs it or on how many there are.
template <typename Work>
static void parallel_for(int64_t items, int threads, const Work& work) {
    hfs_parallel_fn fork = threads > 1 && items > 1 ? hfs_parallel() : nullptr;
    if (!fork) {
        for (int64_t i = 0; i < items; i++) work(i);
        return;
    }
    struct Job {
        const Work* work;
        int64_t items, next;
        static void run(void* self) {
            Job* job = (Job*)self;
            for (;;) {
                const int64_t i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
                if (i >= job->items) return;
                (*job->work)(i);
            }
        }
    } job = {&work, items, 0};
    // Always the full team: a smaller one makes libgomp end threads that the next torch operator starts again.
    fork(&Job::run, &job, (unsigned)threads, 0);
}

}  // namespace HFS_ISA
