#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

namespace selfindex {
namespace {

struct Loop {
  Task task;
  void* context;
  int64_t count;
  int threads;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};

  void work() {
    const int worker = workers.fetch_add(1, std::memory_order_relaxed);
    if (worker >= threads) return;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      task(context, i, worker);
  }
};

void enter(void* loop) { static_cast<Loop*>(loop)->work(); }

// The OpenMP runtime that PyTorch has loaded, if its entry point is visible. A second pool of
// threads would compete with PyTorch's, whose threads wait for their next loop without sleeping.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

OpenMpParallel open_mp() {
  static const auto found =
      reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void run_tasks(int threads, int64_t count, Task task, void* context) {
  if (count < threads) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) task(context, i, 0);
    return;
  }
  Loop loop{task, context, count, threads};
  if (open_mp()) {
    open_mp()(enter, &loop, static_cast<unsigned>(threads), 0);
    return;
  }
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

}  // namespace selfindex
