// The host's end of a Mail.
#pragma once

#include <sched.h>

#include <chrono>

#include "launch.h"

namespace elang {

// Waits for `sequence`; true once it is there. Spins for the first milliseconds, in which a batch of a latency-critical
// service is done, then gives way. Now and then it asks `alive`, and goes home after a last look if that says no, or after
// `seconds`.
template <class F>
bool await_mail(const Mail& mail, uint64_t sequence, double seconds, const F& alive) {
  using Clock = std::chrono::steady_clock;
  const auto here = [&] { return __atomic_load_n(&mail.sequence, __ATOMIC_ACQUIRE) == sequence; };
  const auto start = Clock::now();
  for (int look = 1; !here(); ++look) {
    if (look % 256) continue;
    const std::chrono::duration<double> waited = Clock::now() - start;
    if (waited.count() > seconds || !alive()) return here();
    if (waited.count() > 5e-3) sched_yield();
  }
  return true;
}

}  // namespace elang
