// Loops over tasks on several threads.
#pragma once

#include <cstdint>

namespace selfindex {

// A task's number and the thread's, below the number of threads asked for.
using Task = void (*)(void* context, int64_t task, int worker);

// Runs tasks 0 .. count - 1 on up to `threads` threads, this one among them; returns when all are
// done. Tasks must not throw.
void run_tasks(int threads, int64_t count, Task task, void* context);

template <class Work>
void parallel_for(int threads, int64_t count, const Work& work) {
  run_tasks(
      threads, count,
      [](void* context, int64_t task, int worker) {
        (*static_cast<const Work*>(context))(task, worker);
      },
      const_cast<Work*>(&work));
}

}  // namespace selfindex
