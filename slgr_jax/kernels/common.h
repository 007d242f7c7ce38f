// What the kernels share: names of their arrays, and work shared out over XLA's own threads.

#ifndef SLGR_JAX_KERNELS_COMMON_H_
#define SLGR_JAX_KERNELS_COMMON_H_

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "calls.h"

// For functions that do nothing but prefetch: GCC takes one for free of effects and drops its calls,
// unless it is inlined first.
#define SLGR_PREFETCHES __attribute__((always_inline))

// For functions whose arguments are blocks, which a call would pass through memory, and for those
// whose compiled code a test reads.
#define SLGR_INLINE __attribute__((always_inline))

namespace slgr {

constexpr int64_t kSmall = 1 << 14;  // numbers touched under which a second thread does not pay

using F32 = Buffer<float>;
using S32 = Buffer<int32_t>;
using U32 = Buffer<uint32_t>;
using OutF32 = Out<float>;
using OutS32 = Out<int32_t>;

// Runs `task(0)` ... `task(n - 1)` on this thread and on the pool's. A thread begins with the
// task that its core worked on in the calls before, whose columns its caches hold.
template <typename Task>
void Parallel(const ThreadPool& pool, int64_t n, int64_t work, const Task& task) {
  if (n <= 1 || work < kSmall) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  struct Shared {
    std::unique_ptr<std::atomic<bool>[]> taken;
    std::atomic<int64_t> done{0};
  };
  // Shared, since a thread may only get to it when all is done and this call has returned.
  auto shared = std::make_shared<Shared>();
  shared->taken.reset(new std::atomic<bool>[n]());
  auto work_on = [shared, n, &task] {
    const int64_t first = std::max(sched_getcpu(), 0) % n;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = (first + k) % n;
      if (shared->taken[i].exchange(true)) continue;
      task(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(n, pool.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(work_on);
  work_on();
  for (int64_t spins = 0; shared->done.load(std::memory_order_acquire) < n; ++spins) {
    if (spins > 1 << 12) sched_yield();
  }
}

}  // namespace slgr

#endif  // SLGR_JAX_KERNELS_COMMON_H_
