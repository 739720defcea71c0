// Payload in host memory: before attention, every selected token is looked up in a set-associative
// cache on the device, and what is not there is fetched over the bus into the place of the token
// of its set that was used longest ago. 8 lanes a token, one way of its set each.
//
// A way is one 64-bit word, token << 32 | step of its last use, and changes only by compare-and-swap
// and at most once a step: who finds his token stamps it with this step, who does not replaces a way
// that bears another step. So what one of them decided on holds until attention has read it, and
// the result does not depend on who came first; a token that found no way is read where it is.
#define OFFLOADED 1
constexpr int WAYS = 8, FETCH_TOKENS = 32, ATTEMPTS = 4;
#if PAPER
constexpr int ENTRY = (TOKEN + SCALES + 15) / 16 * 16; // bytes of a token in the cache: codes, then what 32 channels share
#else
constexpr int ENTRY = (TOKEN + 15) / 16 * 16;             // bytes of a token in the cache
#endif

struct Recent {
  u64* ways;          // [heads, sets, WAYS]
  u8* data;           // [heads, sets, WAYS, ENTRY]
  u8* scales;         // [heads, sets, WAYS]: value scales; paper: nothing
  u32* clock;         // [2]: number of this step; blocks that are done with it
  u64* fetched;       // tokens that came over the bus so far
  int* place;         // [rows, width]: where a selected token is in the cache, -1 where it is not
  int sets;
};

extern "C" __global__ void __launch_bounds__(FETCH_TOKENS * WAYS, 6) fetch(const __grid_constant__ Params p, const __grid_constant__ Recent recent) {
  const int tid = threadIdx.x, way = tid % WAYS, start = tid & 31 & ~(WAYS - 1), row = blockIdx.y, h = row % p.heads;
  const u32 mask = 0xffu << start;
  wait_previous();
  const u32 now = __ldcg(recent.clock);
  const int k = p.take[row], i = blockIdx.x * FETCH_TOKENS + tid / WAYS;
  bool missing = false;
  if (i < k) {
    const int slot = p.selected[(i64)row * p.width + i], t = slot % PAGE;
    const int block = p.table[(i64)(row / p.heads) * p.pages + slot / PAGE];
    const u32 token = (u32)block * PAGE + t;
    // Fibonacci hashing spreads neighbours evenly over the sets.
    const u32 set = (u32)((u64)(token * 0x9E3779B9u) * (u32)recent.sets >> 32);
    const i64 first = ((i64)h * recent.sets + set) * WAYS;
    i64 place = -1;
    for (int attempt = 0; attempt < ATTEMPTS && place < 0; attempt++) {
      const u64 word = __ldcg(recent.ways + first + way);
      const u32 found = __ballot_sync(mask, (u32)(word >> 32) == token);
      int chosen;
      if (found) chosen = __ffs(found) - 1 - start;
      else {
        // Of empty ways the steps are far in the past.
        const u32 oldest = __reduce_max_sync(mask, min(now - (u32)word, 0x1fffffffu) << 3 | way);
        if (oldest < WAYS) break;   // all were used in this step
        chosen = oldest % WAYS;
      }
      const u64 seen = __shfl_sync(mask, word, start + chosen), wanted = (u64)token << 32 | now;
      bool done = seen == wanted;   // another row that shares the page was here
      if (!done) {
        u64 before = 0;
        if (way == 0) before = atomicCAS(recent.ways + first + chosen, seen, wanted);
        done = __shfl_sync(mask, before, start) == seen;
      }
      if (done) { place = first + chosen; missing = !found; }
    }
    if (missing || place < 0) {
      const u8* from = p.payload + (i64)block * p.payload_stride + (i64)h * PAYLOAD_RECORD;
      if (place >= 0) {
        u8* to = recent.data + place * ENTRY;
        if constexpr (TOKEN % 16 == 0) {
          for (int part = way; part < TOKEN / 16; part += WAYS) ((uint4*)to)[part] = ((const uint4*)(from + t * TOKEN))[part];
        } else {
          for (int part = way; part < TOKEN / 4; part += WAYS) ((u32*)to)[part] = ((const u32*)(from + t * TOKEN))[part];
        }
#if PAPER
#pragma unroll 1
        for (int i = way; i < SCALES / 8; i += WAYS) ((u64*)(to + TOKEN))[i] = ((const u64*)(from + KEY_SCALES + t * SCALES))[i];
#else
        if (way == WAYS - 1) recent.scales[place] = from[VALUE_SCALES + t];
#endif
      }
      missing = true;
    }
    if (way == 0) recent.place[(i64)row * p.width + i] = (int)place;
  }
  const int count = __syncthreads_count(missing && way == 0);
  if (tid == 0) {
    if (count) atomicAdd(recent.fetched, (u64)count);
    // All blocks have read the clock before the last one moves it.
    if (atomicAdd(recent.clock + 1, 1u) == gridDim.x * gridDim.y - 1) { recent.clock[1] = 0; recent.clock[0] = now + 1; }
  }
}
