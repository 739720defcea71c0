#include "arena.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <utility>

namespace selfindex {
namespace {

constexpr size_t kHeader = 64;  // in front of the memory: its size

// Atomic, not behind a mutex: a fork may come while another thread is here.
std::atomic<char*> kept[8];
std::atomic<size_t> kept_size{0};

size_t& size_of(char* block) { return *reinterpret_cast<size_t*>(block); }

#ifdef __SANITIZE_ADDRESS__
char* map(size_t size) { return static_cast<char*>(std::aligned_alloc(64, size)); }
void unmap(char* block) { std::free(block); }
#else
// Not from malloc, which keeps for itself what is freed.
char* map(size_t size) {
  void* block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return block == MAP_FAILED ? nullptr : static_cast<char*>(block);
}
void unmap(char* block) { munmap(block, size_of(block)); }
#endif

void keep(char* block) {
  const size_t size = size_of(block);
  if (kept_size.fetch_add(size) + size <= kMostKept)
    for (std::atomic<char*>& place : kept) {
      char* empty = nullptr;
      if (place.compare_exchange_strong(empty, block)) return;
    }
  kept_size.fetch_sub(size);
  unmap(block);
}

char* kept_block(std::atomic<char*>& place) {
  char* block = place.exchange(nullptr);
  if (block) kept_size.fetch_sub(size_of(block));
  return block;
}

}  // namespace

size_t kept_bytes() { return kept_size.load(); }

void Arena::borrow(size_t wanted) {
  wanted += kHeader;
  char* block = nullptr;
  for (std::atomic<char*>& place : kept) {
    char* found = kept_block(place);
    // The largest one that is too small goes: its successor will be kept in its place.
    if (found && (!block || size_of(found) > size_of(block))) std::swap(found, block);
    if (found) keep(found);
    if (block && size_of(block) >= wanted) break;
  }
  if (!block || size_of(block) < wanted) {
    if (block) unmap(block);
    // A little more, since contexts grow.
    const size_t size = (wanted + wanted / 8 + 4095) / 4096 * 4096;
    block = map(size);
    if (!block) throw std::bad_alloc();
    size_of(block) = size;
  }
  memory_ = block + kHeader;
  size_ = size_of(block) - kHeader;
}

void Arena::give_back() {
  if (memory_) keep(memory_ - kHeader);
  memory_ = nullptr;
  size_ = 0;
}

}  // namespace selfindex
