// Runs CUDA kernels on the host, for tests: every source of csrc/cuda compiles as C++ behind this header.
//
// A block is an OS thread whose CUDA threads are fibers, so `__shared__` is thread_local; two blocks run at once, in random
// order. Fibers change places at random wherever threads meet. Under ThreadSanitizer each fiber is a thread of its own, and
// only what orders memory on a GPU orders it here: __syncthreads, and a __threadfence around an atomic. Shuffles, ballots
// and atomics by themselves do not. Barriers and collectives that not all threads reach end in "deadlock".
// Planted faults, to see that they are found: PLANT=barrier or PLANT=fence in the environment leaves those out.
#pragma once

#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>
#include <vector_types.h>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define UNSEEN __attribute__((no_sanitize("thread"), noinline))
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define UNSEEN
#else
#define UNSEEN
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ static
#define __device__
#define __host__
#define __shared__ __constinit thread_local  // no initialiser to call on each access
#define __launch_bounds__(...)
#define __grid_constant__

namespace cuda_on_host {

constexpr int kThreads = 256, kWarp = 32, kBlocksAtOnce = 2;
constexpr size_t kStackBytes = 256 << 10;

inline unsigned seed = 0;

inline bool planted(const char* what) {
  static const char* const fault = std::getenv("PLANT");
  return fault && strcmp(fault, what) == 0;
}

// The fibers of one OS thread. Its own state is nothing that a sanitizer should see.
class Block {
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    void* tsan = nullptr;
    void* asan = nullptr;
    bool done = true;
    const uint64_t* counter = nullptr;  // it runs on once *counter reaches goal
    uint64_t goal = 0;
    const void* last_atomic = nullptr;
    bool fenced = false;
    uint64_t rounds = 0;  // collectives it has been part of
  };

  Fiber fibers_[kThreads];
  ucontext_t scheduler_;
  void* scheduler_tsan_ = nullptr;
  void* scheduler_asan_ = nullptr;
  int now_ = 0;
  std::mt19937 random_;
  std::function<void()> body_;
  uint64_t barrier_ = 0, barriers_[kThreads] = {};
  uint64_t warp_counter_[kThreads / kWarp] = {};
  uint64_t slots_[kThreads / kWarp][2][kWarp];
  bool votes_[kThreads] = {};
  char block_end_ = 0, meeting_[2] = {};  // addresses for the sanitizer

 public:
  static inline thread_local Block* current = nullptr;
  dim3 block_index, grid;

  explicit Block(unsigned seed) : random_(seed) {
    for (int t = 0; t < kThreads; ++t) {
      getcontext(&fibers_[t].context);
      fibers_[t].context.uc_stack.ss_sp = fibers_[t].stack.get();
      fibers_[t].context.uc_stack.ss_size = kStackBytes;
      makecontext(&fibers_[t].context, &Block::trampoline, 0);
#if defined(__SANITIZE_THREAD__)
      fibers_[t].tsan = __tsan_create_fiber(0);
#endif
    }
  }

  ~Block() {
#if defined(__SANITIZE_THREAD__)
    for (Fiber& f : fibers_) __tsan_destroy_fiber(f.tsan);
#endif
  }

  UNSEEN void run(unsigned index, std::function<void()> body) {
    current = this;
    block_index = dim3(index);
    body_ = std::move(body);
    for (Fiber& f : fibers_) f.done = false, f.counter = nullptr;
#if defined(__SANITIZE_THREAD__)
    scheduler_tsan_ = __tsan_get_current_fiber();
    __tsan_release(&block_end_);
#endif
    for (int next; (next = pick()) >= 0;) {
      now_ = next;
      enter(fibers_[next]);
    }
    for (const Fiber& f : fibers_)
      if (!f.done) fail("deadlock: a barrier or a collective that not all threads reach");
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&block_end_);
#endif
  }

  UNSEEN int thread() const { return now_; }

  UNSEEN void wait(const uint64_t* counter, uint64_t goal) {
    fibers_[now_].counter = counter, fibers_[now_].goal = goal;
    leave(fibers_[now_]);
  }

  UNSEEN void barrier() {
    const uint64_t round = ++barriers_[now_];
    fibers_[now_].fenced = false;  // a fence says nothing of what others write before this barrier
    meet(&meeting_[round % 2], true);
    ++barrier_;
    wait(&barrier_, round * kThreads);
    meet(&meeting_[round % 2], false);
  }

  UNSEEN int barrier_count(bool vote) {
    votes_[now_] = vote;
    barrier();
    int count = 0;
    for (bool v : votes_) count += v;
    barrier();
    return count;
  }

  // Every lane's value, once all lanes of the warp have given one. It holds until the lane's next collective.
  UNSEEN const uint64_t* collect(uint64_t value) {
    const int warp = now_ / kWarp;
    const uint64_t round = fibers_[now_].rounds++;
    slots_[warp][round % 2][now_ % kWarp] = value;
    ++warp_counter_[warp];
    wait(&warp_counter_[warp], (round + 1) * kWarp);
    return slots_[warp][round % 2];
  }

  UNSEEN void fence() {
    Fiber& f = fibers_[now_];
    f.fenced = true;
#if defined(__SANITIZE_THREAD__)
    if (f.last_atomic) __tsan_acquire(const_cast<void*>(f.last_atomic));
#endif
  }

  // Of an atomic at this address: whether it publishes what came before, as one behind a fence does.
  UNSEEN bool publishes(const void* at) {
    Fiber& f = fibers_[now_];
    f.last_atomic = at;
    return std::exchange(f.fenced, false);
  }

 private:
  [[noreturn]] static void fail(const char* why) {
    std::fprintf(stderr, "cuda_on_host: %s\n", why);
    std::abort();
  }

  UNSEEN void meet([[maybe_unused]] void* at, [[maybe_unused]] bool arriving) {
#if defined(__SANITIZE_THREAD__)
    static const bool left_out = planted("barrier");
    if (left_out) return;
    if (arriving) __tsan_release(at);
    else __tsan_acquire(at);
#endif
  }

  UNSEEN int pick() {
    const int start = static_cast<int>(random_() % kThreads);
    for (int i = 0; i < kThreads; ++i) {
      const int t = (start + i) % kThreads;
      const Fiber& f = fibers_[t];
      if (!f.done && (!f.counter || *f.counter >= f.goal)) return t;
    }
    return -1;
  }

  UNSEEN void enter(Fiber& f) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_asan_, f.stack.get(), kStackBytes);
#endif
    swapcontext(&scheduler_, &f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_asan_, nullptr, nullptr);
#endif
  }

  UNSEEN void leave(Fiber& f) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_tsan_, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&f.asan, scheduler_stack_, scheduler_stack_bytes_);
#endif
    swapcontext(&f.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f.asan, nullptr, nullptr);
#endif
  }

#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#endif

  UNSEEN static void trampoline() {
    Block& b = *current;
    Fiber& f = b.fibers_[b.now_];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack_, &b.scheduler_stack_bytes_);
#endif
    for (;;) {
#if defined(__SANITIZE_THREAD__)
      __tsan_acquire(&b.block_end_);
#endif
      b.body_();
#if defined(__SANITIZE_THREAD__)
      __tsan_release(&b.block_end_);
#endif
      f.done = true;
      b.leave(f);
    }
  }
};

inline Block& block() { return *Block::current; }

template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  return bits;
}

template <class T>
UNSEEN T shuffle(T value, int from_lane) {
  const uint64_t bits = block().collect(bits_of(value))[from_lane & (kWarp - 1)];
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline int lane() { return block().thread() % kWarp; }

// Runs `kernel` over all blocks of the grid.
template <class F>
void launch(int64_t blocks, const F& kernel) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937(++seed));
  std::vector<std::thread> threads;
  for (int team = 0; team < std::min<int64_t>(kBlocksAtOnce, blocks); ++team)
    threads.emplace_back([&, team] {
      Block runner(seed * kBlocksAtOnce + team);
      runner.grid = dim3(static_cast<unsigned>(blocks));
      for (size_t i = team; i < order.size(); i += kBlocksAtOnce) runner.run(order[i], kernel);
    });
  for (std::thread& t : threads) t.join();
}

}  // namespace cuda_on_host

#define threadIdx (dim3(cuda_on_host::block().thread(), 0, 0))
#define blockIdx (cuda_on_host::block().block_index)
#define gridDim (cuda_on_host::block().grid)

inline void __syncthreads() { cuda_on_host::block().barrier(); }
inline int __syncthreads_count(int vote) { return cuda_on_host::block().barrier_count(vote != 0); }
inline void __threadfence() {
  static const bool left_out = cuda_on_host::planted("fence");
  if (!left_out) cuda_on_host::block().fence();
}
inline void __threadfence_system() { __threadfence(); }
inline void __nanosleep(unsigned) { sched_yield(); }

template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  return cuda_on_host::shuffle(value, cuda_on_host::lane() / width * width + from % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return cuda_on_host::shuffle(value, cuda_on_host::lane() ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int step, int width = 32) {
  const int lane = cuda_on_host::lane();
  return cuda_on_host::shuffle(value, lane % width + step < width ? lane + step : lane);
}
UNSEEN inline unsigned __ballot_sync(unsigned, int vote) {
  const uint64_t* votes = cuda_on_host::block().collect(vote != 0);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(votes[lane]) << lane;
  return all;
}

namespace cuda_on_host {
template <int kOrder, class T>
T fetch_max(T* at, T value) {
  T seen = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &seen, std::max(seen, value), true, kOrder, __ATOMIC_RELAXED)) {
  }
  return seen;
}
}  // namespace cuda_on_host

template <class T>
T atomicAdd(T* at, T value) {
  return cuda_on_host::block().publishes(at) ? __atomic_fetch_add(at, value, __ATOMIC_RELEASE)
                                             : __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* at, T value) {
  return cuda_on_host::block().publishes(at) ? cuda_on_host::fetch_max<__ATOMIC_RELEASE>(at, value)
                                             : cuda_on_host::fetch_max<__ATOMIC_RELAXED>(at, value);
}

template <class T>
T __ldg(const T* at) { return *at; }
template <class T>
T __ldcg(const T* at) { return *at; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
