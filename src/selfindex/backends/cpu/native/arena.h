// Memory for one call, kept for the next one: fresh pages from the system cost more than the work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace selfindex {

class Arena {
 public:
  ~Arena() { std::free(memory_); }

  // First pass: sizes only. Second pass: memory. Both passes make the same calls.
  template <class T>
  T* take(int64_t count) {
    used_ = (used_ + 63) / 64 * 64;
    char* at = memory_ ? memory_ + used_ : nullptr;
    used_ += count * sizeof(T);
    return measuring_ ? nullptr : reinterpret_cast<T*>(at);
  }

  // `plan` takes everything it needs; afterwards its pointers are valid until the next call.
  template <class Plan>
  void lay_out(Plan&& plan) {
    measuring_ = true;
    used_ = 0;
    plan();
    if (used_ > size_) {
      std::free(memory_);
      size_ = 0;
      const size_t wanted = (used_ + 4095) / 4096 * 4096;
      memory_ = static_cast<char*>(std::aligned_alloc(64, wanted));
      if (!memory_) throw std::bad_alloc();
      size_ = wanted;
    }
    measuring_ = false;
    used_ = 0;
    plan();
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
  bool measuring_ = false;
};

}  // namespace selfindex
