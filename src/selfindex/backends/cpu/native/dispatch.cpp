// Picks the kernels this processor can run.
#include <cstring>

#include "kernels.h"

namespace selfindex {

namespace generic { extern const Kernels kernels; }
#ifdef SELFINDEX_X86
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif
#ifdef SELFINDEX_NEON
namespace neon { extern const Kernels kernels; }
#endif

const Kernels* kernels_named(const char* name) {
#ifdef SELFINDEX_X86
  // These builtins also ask the operating system whether it keeps the wide registers.
  __builtin_cpu_init();
  const bool can_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(name, "avx512"))
    return can_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? &avx512::kernels
               : nullptr;
  if (!std::strcmp(name, "avx2")) return can_avx2 ? &avx2::kernels : nullptr;
#endif
#ifdef SELFINDEX_NEON
  // Every 64-bit ARM processor has it.
  if (!std::strcmp(name, "neon")) return &neon::kernels;
#endif
  return !std::strcmp(name, "generic") ? &generic::kernels : nullptr;
}

}  // namespace selfindex
