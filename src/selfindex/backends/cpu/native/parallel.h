// Loops over tasks on several threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace selfindex {

// A task's number and the thread's, below the number of threads asked for.
using Task = void (*)(void* context, int64_t task, int worker);

// Runs tasks 0 .. count - 1 on up to `threads` threads, this one among them; returns when all are
// done. Throws the first exception of a task, after which no thread begins another one.
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

// One step of the work on a unit: `tasks` independent tasks.
struct Phase {
  int64_t tasks;
  std::function<void(int64_t unit, int64_t task, int worker)> work;
};

// Runs all phases on every unit, each when the unit's phase before it is done. One loop for all of
// them: a barrier after each phase costs microseconds, and milliseconds where another process has
// taken the processor of a thread.
void run_phases(int threads, int64_t units, std::vector<Phase> phases);

}  // namespace selfindex
