// A warp's own ring of index records in shared memory: bulk copies that complete on a barrier where
// the hardware has them (9.0 and up), 16-byte asynchronous copies elsewhere.
constexpr int STAGES = 2;
constexpr int SLOT = (INDEX_RECORD + 127) / 128 * 128;

struct Ring {
  u32 data;       // STAGES x SLOT, address in shared memory
  u32 barriers;   // STAGES x 8
  int stage, phase;

  __device__ __forceinline__ void open(u8* memory, u64* bars, int lane) {
    data = shared_address(memory); barriers = shared_address(bars); stage = 0; phase = 0;
    // Through a shuffle, so that the compiler keeps the addresses instead of computing them again.
    data = __shfl_sync(~0u, data, 0); barriers = __shfl_sync(~0u, barriers, 0);
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      for (int s = 0; s < STAGES; s++)
        asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(barriers + s * 8) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
#endif
  }
  // Start the copy of a record, if there is one more to read, into stage s.
  __device__ __forceinline__ void fetch(int s, bool more, const u8* record, int lane) {
#if __CUDA_ARCH__ >= 900
    if (more && lane == 0) {
      const u32 bar = barriers + s * 8, to = data + s * SLOT;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(bar), "r"(INDEX_RECORD) : "memory");
      // The index is read once a step: let it leave the L2 cache first.
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;"
                   ::"r"(to), "l"(record), "r"(INDEX_RECORD), "r"(bar), "l"(0x12F0000000000000ull) : "memory");
    }
#else
    if (more)
      for (int i = lane * 16; i < INDEX_RECORD; i += 512)
        asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(data + s * SLOT + i), "l"(record + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  // Record of the current stage, once it has arrived.
  __device__ __forceinline__ u32 wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}"
                 ::"r"(barriers + stage * 8), "r"(phase) : "memory");
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
#endif
    return data + stage * SLOT;
  }
  __device__ __forceinline__ void next() { if (++stage == STAGES) { stage = 0; phase ^= 1; } }
};
