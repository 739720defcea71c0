// A warp's own ring of index records in shared memory: bulk copies that complete on a barrier where
// the hardware has them (9.0 and up), 16-byte asynchronous copies elsewhere.
constexpr int STAGES = 2;
constexpr int SLOT = (INDEX_RECORD + 16 + 127) / 128 * 128;   // a record; in the last 16 bytes, its name and its barrier

struct Ring {
  u32 data;   // STAGES x SLOT, address in shared memory

  __device__ __forceinline__ u32 barrier(int s) const { return data + s * SLOT + SLOT - 8; }
  __device__ __forceinline__ void open(u8* memory, int lane) {
    // Through a shuffle, so that the compiler keeps the address instead of computing it again.
    data = __shfl_sync(~0u, shared_address(memory), 0);
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      for (int s = 0; s < STAGES; s++)
        asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(barrier(s)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
#endif
  }
  // Start the copy of a record, if there is one more to read, into stage s.
  __device__ __forceinline__ void fetch(int s, bool more, const u8* record, u32 name, int lane) {
#if __CUDA_ARCH__ >= 900
    // One thread, chosen in a way that the compiler understands: otherwise it loops over the lanes.
    // The index is read once a step: let it leave the L2 cache first.
    if (more)
      asm volatile("{\n.reg .pred p;\nelect.sync _|p,0xffffffff;\n"
                   "@p st.shared.u32 [%0+%4],%5;\n"
                   "@p mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0+%6],%2;\n"
                   "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%7],%3;\n}"
                   ::"r"(data + s * SLOT), "l"(record), "r"(INDEX_RECORD), "l"(0x12F0000000000000ull), "n"(SLOT - 16), "r"(name),
                   "n"(SLOT - 8), "r"(barrier(s)) : "memory");
#else
    if (more && lane == 0) asm volatile("st.shared.u32 [%0],%1;" ::"r"(data + s * SLOT + SLOT - 16), "r"(name) : "memory");
    if (more)
      for (int i = lane * 16; i < INDEX_RECORD; i += 512)
        asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(data + s * SLOT + i), "l"(record + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  // The n-th record, once it has arrived; no other may be under way.
  __device__ __forceinline__ u32 wait(int n) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}"
                 ::"r"(barrier(n % STAGES)), "r"(n / STAGES & 1) : "memory");
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
#endif
    return data + n % STAGES * SLOT;
  }
  // Before the memory serves something else.
  __device__ __forceinline__ void close(int lane) const {
#if __CUDA_ARCH__ >= 900
    if (lane == 0)
      for (int s = 0; s < STAGES; s++) asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier(s)) : "memory");
#endif
  }
};

// A warp's pages of a block's first .. last - 1: first + w, first + w + WARPS, ...
template <int WARPS> struct PageReader {
  const int *table, *counts;
  const u8* index;
  u32 entries, stride;   // lane l holds block and count (upper 8 bits) of page n = 32 i + l
  int start, last, lane, mine;
  Ring ring;

  // Has the first record copied.
  __device__ __forceinline__ void open(const Params& p, int row, int first, int end, u8* memory) {
    // Read through a shuffle, the lane and what follows from it stay in registers.
    lane = __shfl_sync(~0u, threadIdx.x, threadIdx.x) & 31;
    const int w = threadIdx.x >> 5;
    table = p.table + (i64)(row / p.heads) * p.pages;
    counts = p.counts + (i64)(row / p.heads) * p.pages;
    index = p.index + (i64)(row % p.heads) * INDEX_RECORD;
    stride = (u32)p.index_stride;
    start = first + w;
    last = end;
    mine = max(0, (end - first - w + WARPS - 1) / WARPS);
    entries = entry(lane);
    ring.open(memory + w * STAGES * SLOT, lane);
    fetch(0);
  }
  __device__ __forceinline__ u32 entry(int n) const {
    const int page = min(start + n * WARPS, max(last - 1, 0));
    return (u32)table[page] | (u32)counts[page] << 24; }
  __device__ __forceinline__ void fetch(int n) {
    if (n && (n & 31) == 0) entries = entry(n + lane);
    const u32 name = __shfl_sync(~0u, entries, n);
    ring.fetch(n % STAGES, n < mine, index + (u64)(name & 0xffffff) * stride, name, lane); }
};
