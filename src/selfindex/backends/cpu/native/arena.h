// Memory for one call. Some of it is kept for later calls: fresh pages from the system cost more than
// the work.
#pragma once

#include <cstddef>
#include <cstdint>

namespace selfindex {

// What is kept, for all threads of the process together.
constexpr size_t kMostKept = 24 << 20;

// Bytes that are kept at the moment, kMostKept at most.
size_t kept_bytes();

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { give_back(); }

  // First pass: sizes only. Second pass: memory. Both passes make the same calls.
  template <class T>
  T* take(int64_t count) {
    used_ = (used_ + 63) / 64 * 64;
    char* at = memory_ ? memory_ + used_ : nullptr;
    used_ += count * sizeof(T);
    return measuring_ ? nullptr : reinterpret_cast<T*>(at);
  }

  // `plan` takes everything it needs; afterwards its pointers are valid until the next call.
  // Throws std::bad_alloc where the system has no more memory.
  template <class Plan>
  void lay_out(Plan&& plan) {
    measuring_ = true;
    used_ = 0;
    plan();
    if (used_ > size_) {
      give_back();
      borrow(used_);
    }
    measuring_ = false;
    used_ = 0;
    plan();
  }

 private:
  void borrow(size_t wanted);
  void give_back();

  char* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
  bool measuring_ = false;
};

}  // namespace selfindex
