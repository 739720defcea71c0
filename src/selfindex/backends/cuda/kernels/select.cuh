// Exact selection of the k largest of a row's 11-bit keys, ties to the lower slot, by a cluster: a
// histogram over the row finds the threshold, a pass over the keys leaves one bit a token (above the
// threshold, equal to it), and a prefix sum over warps and blocks the place of every selected slot,
// so that slots come out ascending and the result does not depend on timing. Key 0: no token here.
//
// A block's keys lie in chunks of 128 (one page), and are overwritten.
constexpr int BINS = 2048, MOST_BLOCKS = 16;
constexpr int SELECT_BYTES = 17 * 1024;   // room for SelectMemory

template <int WARPS> struct SelectMemory {
  u32 histogram[BINS], sums[BINS];        // of the block, of the row
  u32 warp_sums[8], message[2];
  uint2 warp_counts[WARPS], block_counts[MOST_BLOCKS];   // tokens above and at the threshold
};

// Where the keys of a block's pages are: the first `split` in one place, the others in another.
struct KeyPlaces {
  u8 *near, *far;
  int split, near_stride, far_stride;
  __device__ __forceinline__ u8* at(int page) const {
    return page < split ? near + page * near_stride : far + (i64)page * far_stride; }
};

// Bit i is set where key i of eight is >= the threshold (1 .. 2048).
__device__ __forceinline__ u32 at_least(const uint4& keys, u32 threshold) {
  const u32 add = (0x8000 - threshold) * 0x10001;   // carries into bit 15 of a half
  u32 z = (keys.x + add) >> 15 & 0x10001;           // keys 0 and 1 at bits 0 and 16
  z |= (keys.y + add) >> 13 & 0x40004;
  z |= (keys.z + add) >> 11 & 0x100010;
  z |= (keys.w + add) >> 9 & 0x400040;
  return (z | z >> 15) & 0xff; }

// The histogram of this block's keys > 0 is in memory.histogram; slots start at first_slot.
template <int WARPS>
__device__ __forceinline__ void select_keys(SelectMemory<WARPS>& m, const KeyPlaces& keys, int pages, i64 first_slot,
                                            int k, int rank, int size, int* selected) {
  constexpr int THREADS = WARPS * 32, PER = BINS / 256;
  static_assert(WARPS >= 8, "256 threads look for the threshold");
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  cluster_sync();
  const u32* sums = m.histogram;
  if (size > 1) {   // every block adds up its share of the bins and hands it to all
    for (int i = rank + tid * size; i < BINS / 4; i += THREADS * size) {
      uint4 sum = make_uint4(0, 0, 0, 0);
#pragma unroll 8
      for (int other = 0; other < size; other++) {
        const uint4 v = load_remote4(m.histogram + i * 4, other);
        sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w;
      }
      for (int other = 0; other < size; other++) store_remote4(m.sums + i * 4, other, sum);
    }
    cluster_sync();
    sums = m.sums;
  }
  u32 own = 0, inclusive = 0;   // keys in this thread's bins; and above
  if (w < 8) {
#pragma unroll
    for (int i = 0; i < PER; i++) own += sums[tid * PER + i];
    inclusive = own;
#pragma unroll
    for (int s = 1; s < 32; s <<= 1) { const u32 o = __shfl_down_sync(~0u, inclusive, s); if (lane + s < 32) inclusive += o; }
    if (lane == 0) m.warp_sums[w] = inclusive;
  }
  __syncthreads();
  if (w < 8) {
    for (int i = w + 1; i < 8; i++) inclusive += m.warp_sums[i];
    if (inclusive >= (u32)k && inclusive - own < (u32)k) {   // the k-th largest is here: exactly one thread
      u32 above = inclusive - own;
      for (int i = PER - 1; i >= 0; i--) {
        const u32 n = sums[tid * PER + i];
        if (above + n >= (u32)k) { m.message[0] = tid * PER + i; m.message[1] = k - above; break; }
        above += n;
      }
    }
  }
  __syncthreads();
  const u32 threshold = m.message[0], ties = m.message[1];
  if (w == 0) {   // tell the others how many slots this block has
    u32 over = 0;
    for (int i = lane; i < BINS; i += 32) over += i > (int)threshold ? m.histogram[i] : 0;
    over = warp_sum(over);
    if (lane < size) {
      store_remote(&m.block_counts[rank].x, lane, over);
      store_remote(&m.block_counts[rank].y, lane, m.histogram[threshold]);
    }
  }
  cluster_arrive();
  // Each warp owns a contiguous range of pages, two at a time, a lane eight keys. The bits of a page
  // take the place of its keys: 16 bytes of tokens above the threshold, 16 of tokens at it.
  const int per = (pages + WARPS - 1) / WARPS, begin = min(w * per, pages), end = min(begin + per, pages);
  u32 above = 0, equals = 0;
  for (int start = begin; start < end; start += 2) {
    const int page = start + (lane >> 4);
    u8* at = keys.at(page);
    u32 over = 0, equal = 0;
    if (page < end) {
      const uint4 v = *(const uint4*)(at + (lane & 15) * 16);
      over = at_least(v, threshold + 1);
      equal = at_least(v, threshold) & ~over;
    }
    __syncwarp();
    if (page < end) { at[lane & 15] = (u8)over; at[16 + (lane & 15)] = (u8)equal; }
    above += __popc(over);
    equals += __popc(equal);
  }
  above = warp_sum(above);
  equals = warp_sum(equals);
  if (lane == 0) m.warp_counts[w] = make_uint2(above, equals);
  __syncthreads();
  cluster_wait();
  allow_next();
  u32 over_at, equal_at;
  {   // lane = an earlier block, then an earlier warp
    const uint2 of_block = lane < rank ? m.block_counts[lane] : make_uint2(0, 0), of_warp = lane < w ? m.warp_counts[lane] : make_uint2(0, 0);
    over_at = warp_sum(of_block.x + of_warp.x);
    equal_at = warp_sum(of_block.y + of_warp.y);
  }
  for (int start = begin * 4; start < end * 4; start += 32) {   // a lane 32 tokens
    const int i = start + lane;
    u32 over = 0, equal = 0;
    if (i < end * 4) {
      const u32* bits = (const u32*)keys.at(i >> 2) + (i & 3);
      over = bits[0];
      equal = bits[4];
    }
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
      if (!tie || e < ties) selected[o + min(e, ties)] = (int)(first_slot + (i64)i * 32 + q);
      if (tie) e++; else o++;
    }
    over_at += all & 0xffff;
    equal_at += all >> 16;
  }
}
