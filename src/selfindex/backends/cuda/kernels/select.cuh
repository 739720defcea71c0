// Exact selection of the k largest of a row's 14-bit keys, ties to the lower slot, by a cluster:
// a 1024-bin histogram finds the bin of the threshold, a 16-bin one the threshold inside it, and a
// prefix sum over warps and blocks the place of every selected slot, so that slots come out
// ascending and the result does not depend on timing. Key 0 means: no token here.
//
// A block's keys lie in chunks of 128 (one page), `stride` bytes apart.
constexpr int BINS = 1024, FINE = 16;

template <int WARPS> struct SelectMemory {
  u32 histogram[BINS], sums[BINS], slice[BINS];
  u32 fine[WARPS][FINE + 1];    // keys of a warp in the threshold's bin by fine bin; then above the bin
  u32 totals[FINE + 1];         // the same over the block
  u32 warp_sums[WARPS], message[8];
};

// Bit 15 of each half is set where the packed 15-bit key is >= the threshold (1 .. 2^15).
__device__ __forceinline__ u32 at_least(u32 keys, u32 threshold) {
  return ((keys | 0x80008000u) - threshold * 0x10001u) & 0x80008000u; }
// Bit 2 i + half of the packed comparisons of four words.
__device__ __forceinline__ u32 gather_bits(u32 a, u32 b, u32 c, u32 d) {
  return (a >> 15 & 1) | (a >> 30 & 2) | (b >> 13 & 4) | (b >> 28 & 8) | (c >> 11 & 16) | (c >> 26 & 32) | (d >> 9 & 64) | (d >> 24 & 128); }

// The histogram of this block's keys > 0 is in memory.histogram; slots start at first_slot.
template <int WARPS>
__device__ __forceinline__ void select_keys(SelectMemory<WARPS>& m, const u8* keys, int stride, int count, i64 first_slot,
                                            int k, int rank, int size, int* selected) {
  constexpr int THREADS = WARPS * 32, PER = BINS / THREADS;
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  for (int i = tid; i < BINS; i += THREADS) m.slice[i] = 0;
  for (int i = tid; i < WARPS * (FINE + 1); i += THREADS) ((u32*)m.fine)[i] = 0;
  cluster_sync();
  const u32* sums = m.histogram;
  if (size > 1) {   // every block adds up its share of the bins and hands it to all
    const int width = BINS / size;
    u32 v[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) v[i] = load_remote(m.histogram + rank * width + (tid + i * THREADS) % width, (tid + i * THREADS) / width);
#pragma unroll
    for (int i = 0; i < PER; i++) if (v[i]) atomicAdd(&m.slice[(tid + i * THREADS) % width], v[i]);
    __syncthreads();
#pragma unroll
    for (int i = tid; i < BINS; i += THREADS) store_remote(m.sums + rank * width + i % width, i / width, m.slice[i % width]);
    cluster_sync();
    sums = m.sums;
  }
  u32 own = 0;
#pragma unroll
  for (int i = 0; i < PER; i++) own += sums[tid * PER + i];
  u32 inclusive = own;   // keys in this thread's bins and above
#pragma unroll
  for (int s = 1; s < 32; s <<= 1) { const u32 o = __shfl_down_sync(~0u, inclusive, s); if (lane + s < 32) inclusive += o; }
  if (lane == 0) m.warp_sums[w] = inclusive;
  __syncthreads();
  for (int i = w + 1; i < WARPS; i++) inclusive += m.warp_sums[i];
  if (inclusive >= (u32)k && inclusive - own < (u32)k) {   // the k-th largest is here: exactly one thread
    u32 above = inclusive - own;
    for (int i = PER - 1; i >= 0; i--) {
      const u32 n = sums[tid * PER + i];
      if (above + n >= (u32)k) { m.message[0] = tid * PER + i; m.message[1] = k - above; break; }
      above += n;
    }
  }
  __syncthreads();
  const u32 bin = m.message[0], need = m.message[1];
  // Each warp owns a contiguous range of eights of keys.
  const int eights = count / 8, per = (eights + WARPS - 1) / WARPS, begin = min(w * per, eights), end = min(begin + per, eights);
  const auto load = [&](int i) { return *(const uint4*)(keys + (i64)(i >> 4) * stride + (i & 15) * 16); };
  const u32 low = max(bin * FINE, 1u), high = (bin + 1) * FINE;
  u32 above = 0;
  for (int i = begin + lane; i < end; i += 32) {
    const uint4 v = load(i);
    const u32 over = gather_bits(at_least(v.x, high), at_least(v.y, high), at_least(v.z, high), at_least(v.w, high));
    u32 in = gather_bits(at_least(v.x, low), at_least(v.y, low), at_least(v.z, low), at_least(v.w, low)) & ~over;
    above += __popc(over);
    while (in) {
      const int q = __ffs(in) - 1;
      in &= in - 1;
      const u32 word = q < 2 ? v.x : q < 4 ? v.y : q < 6 ? v.z : v.w;
      atomicAdd(&m.fine[w][(q & 1 ? word >> 16 : word & 0xffff) % FINE], 1u);
    }
  }
  above = warp_sum(above);
  if (lane == 0) m.fine[w][FINE] = above;
  __syncthreads();
  if (tid <= FINE) { u32 s = 0; for (int i = 0; i < WARPS; i++) s += m.fine[i][tid]; m.totals[tid] = s; }
  cluster_sync();
  if (w == 0) {   // lane = rank of a block
    u32 counts[FINE + 1];
#pragma unroll
    for (int i = 0; i <= FINE; i++) counts[i] = lane < size ? load_remote(m.totals + i, lane) : 0;
    u32 sum = 0, fine = 0, ties = 0;
    bool found = false;
#pragma unroll
    for (int i = FINE - 1; i >= 0; i--) {
      const u32 n = warp_sum(counts[i]);
      if (!found && sum + n >= need) { fine = i; ties = need - sum; found = true; }
      sum += n;
    }
    u32 over = counts[FINE], equal = 0;
#pragma unroll
    for (int i = 0; i < FINE; i++) { if (i > (int)fine) over += counts[i]; if (i == (int)fine) equal = counts[i]; }
    u32 over_before = over, equal_before = equal;
#pragma unroll
    for (int s = 1; s < 32; s <<= 1) {
      const u32 a = __shfl_up_sync(~0u, over_before, s), e = __shfl_up_sync(~0u, equal_before, s);
      if (lane >= s) { over_before += a; equal_before += e; }
    }
    if (lane == rank) { m.message[2] = fine; m.message[3] = over_before - over; m.message[4] = equal_before - equal; m.message[5] = ties; }
  }
  __syncthreads();
  cluster_arrive();   // this block has read what it needs of the others
  allow_next();
  const u32 fine = m.message[2], threshold = bin * FINE + fine, ties = m.message[5];
  u32 over_at = m.message[3], equal_at = m.message[4];
  {   // lane = an earlier warp
    u32 over = 0, equal = 0;
    if (lane < w) {
      over = m.fine[lane][FINE];
#pragma unroll
      for (int f = 0; f < FINE; f++) {
        const u32 n = m.fine[lane][f];
        over += f > (int)fine ? n : 0;
        equal = f == (int)fine ? n : equal;
      }
    }
    over_at += warp_sum(over);
    equal_at += warp_sum(equal);
  }
  for (int start = begin; start < end; start += 32) {
    const int i = start + lane;
    u32 over = 0, equal = 0;
    if (i < end) {
      const uint4 v = load(i);
      const u32 t = threshold;
      over = gather_bits(at_least(v.x, t + 1), at_least(v.y, t + 1), at_least(v.z, t + 1), at_least(v.w, t + 1));
      equal = gather_bits(at_least(v.x, t), at_least(v.y, t), at_least(v.z, t), at_least(v.w, t)) & ~over;
    }
    if (!__any_sync(~0u, over | equal)) continue;
    const u32 own_counts = __popc(over) | __popc(equal) << 16;
    u32 scan = own_counts;
#pragma unroll
    for (int s = 1; s < 32; s <<= 1) { const u32 o = __shfl_up_sync(~0u, scan, s); if (lane >= s) scan += o; }
    const u32 all = __shfl_sync(~0u, scan, 31);
    scan -= own_counts;
    u32 o = over_at + (scan & 0xffff), e = equal_at + (scan >> 16), left = over | equal;
    while (left) {
      const int q = __ffs(left) - 1;
      left &= left - 1;
      const bool tie = equal >> q & 1;
      if (!tie || e < ties) selected[o + min(e, ties)] = (int)(first_slot + (i64)i * 8 + q);
      if (tie) e++; else o++;
    }
    over_at += all & 0xffff;
    equal_at += all >> 16;
  }
  cluster_wait();   // nobody leaves while others read its memory
}
