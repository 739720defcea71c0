#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace selfindex {
namespace {

constexpr int kSpins = 1000;  // reads of a counter before a waiting thread lets others run

struct Loop {
  Task task;
  void* context;
  int64_t count;
  int threads;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  // An exception that left a thread would end the process.
  void work() noexcept {
    const int worker = workers.fetch_add(1, std::memory_order_relaxed);
    if (worker >= threads) return;
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
        task(context, i, worker);
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

void enter(void* loop) { static_cast<Loop*>(loop)->work(); }

// The OpenMP runtime that PyTorch has loaded, if its entry point is visible. A second pool of
// threads would compete with PyTorch's, whose threads wait for their next loop without sleeping.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// A forked process has none of the threads that its OpenMP runtime would wait for.
const pid_t home = getpid();

OpenMpParallel open_mp() {
  static const auto found =
      reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == home ? found : nullptr;
}

}  // namespace

void run_tasks(int threads, int64_t count, Task task, void* context) {
  if (count < threads) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) task(context, i, 0);
    return;
  }
  Loop loop{task, context, count, threads};
  if (const OpenMpParallel parallel = open_mp()) {
    parallel(enter, &loop, static_cast<unsigned>(threads), 0);
  } else {
    // Threads of this call only: nothing to keep alive, and nothing that a fork could break.
    std::vector<std::thread> helpers;
    try {
      for (int i = 1; i < threads; i++) helpers.emplace_back(enter, &loop);
    } catch (...) {
      // Fewer threads than asked for do the same work.
    }
    loop.work();
    for (std::thread& helper : helpers) helper.join();
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

void run_phases(int threads, int64_t units, std::vector<Phase> phases) {
  // An empty phase would let the one after it start before the one before it is done.
  phases.erase(std::remove_if(phases.begin(), phases.end(),
                              [](const Phase& phase) { return phase.tasks == 0; }),
               phases.end());
  int64_t total = 0;
  for (const Phase& phase : phases) total += units * phase.tasks;
  std::vector<std::atomic<int64_t>> done(phases.size() * units);
  std::atomic<bool> failed{false};
  parallel_for(threads, total, [&](int64_t i, int worker) {
    size_t at = 0;
    for (; i >= units * phases[at].tasks; at++) i -= units * phases[at].tasks;
    const Phase& phase = phases[at];
    const int64_t unit = i / phase.tasks;
    // Tasks are handed out in order, so what this waits for is done or in the hands of a thread.
    if (at) {
      const std::atomic<int64_t>& before = done[(at - 1) * units + unit];
      for (int spins = 0; before.load(std::memory_order_acquire) < phases[at - 1].tasks; spins++) {
        if (failed.load(std::memory_order_relaxed)) return;  // it will never be done
        if (spins > kSpins) std::this_thread::yield();
      }
    }
    try {
      phase.work(unit, i % phase.tasks, worker);
    } catch (...) {
      failed.store(true, std::memory_order_relaxed);
      throw;
    }
    done[at * units + unit].fetch_add(1, std::memory_order_release);
  });
}

}  // namespace selfindex
