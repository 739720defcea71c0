// Exact selection of the k largest of a row's keys, ties to the lower slot, by a cluster: from
// all blocks' histograms every block finds the threshold and how many tokens come before its own, a pass
// over the keys leaves one bit a token (above the threshold, equal to it), and a prefix sum over warps
// the place of every selected slot, so that slots come out ascending and the result does not depend on
// timing. The histogram has a bin for 11 bits of a key; its other bits (paper) are counted for the keys
// of the bin in which the threshold is. A key of bin 0 is no token.
//
// A block's keys lie in chunks of 128 (one page), and are overwritten.
constexpr int BINS = 2048, COARSE_BINS = BINS / 32;
constexpr int FINE_BITS = PAPER ? 4 : 0, FINE_BINS = 1 << FINE_BITS;
constexpr int SELECT_BYTES = 9 * 1024;    // room for SelectMemory

template <int WARPS> struct SelectMemory {
  u32 histogram[BINS], coarse[COARSE_BINS];   // of the block; sums of 32 bins
  u32 fine[FINE_BINS];                        // of the threshold's bin
  u32 threshold, ties, over_before, equal_before;   // tokens above and at the threshold in earlier blocks
  uint2 warp_counts[WARPS];                   // tokens above and at the threshold
};

template <int WARPS> __device__ __forceinline__ void clear_histogram(SelectMemory<WARPS>& m) {
  for (int i = threadIdx.x; i < BINS; i += WARPS * 32) m.histogram[i] = 0; }

// A block of a cluster, and its run of the row's pages.
struct Block { int rank, size, row, first, pages; };

// Where the keys of a block's pages are: the first `split` in one place, the others in another.
struct KeyPlaces {
  u8 *near, *far;
  int split, near_stride, far_stride;
  __device__ __forceinline__ u8* at(int page) const {
    return page < split ? near + page * near_stride : far + (i64)page * far_stride; }
};

// Keys of a lane's tokens, 4 lane .. 4 lane + 3 of a page that has `count`: to their place and the histogram.
template <int WARPS> __device__ __forceinline__ void put_keys(SelectMemory<WARPS>& m, u8* page, uint2 pair, int count, int lane) {
  const int present = count - lane * 4;
  if (present < 4) pair.y &= present == 3 ? 0xffff : 0;
  if (present < 2) pair.x &= present == 1 ? 0xffff : 0;
  *(uint2*)(page + lane * 8) = pair;
  // Bin 0 counts what does not exist; nobody reads it.
  atomicAdd(&m.histogram[(pair.x & 0xffff) >> FINE_BITS], 1u);
  atomicAdd(&m.histogram[pair.x >> 16 + FINE_BITS], 1u);
  atomicAdd(&m.histogram[(pair.y & 0xffff) >> FINE_BITS], 1u);
  atomicAdd(&m.histogram[pair.y >> 16 + FINE_BITS], 1u);
}

// Bit i is set where key i of eight is >= the threshold (1 .. 32768).
__device__ __forceinline__ u32 at_least(const uint4& keys, u32 threshold) {
  const u32 add = (0x8000 - threshold) * 0x10001;   // carries into bit 15 of a half
  u32 z = (keys.x + add) >> 15 & 0x10001;           // keys 0 and 1 at bits 0 and 16
  z |= (keys.y + add) >> 13 & 0x40004;
  z |= (keys.z + add) >> 11 & 0x100010;
  z |= (keys.w + add) >> 9 & 0x400040;
  return (z | z >> 15) & 0xff; }

// Sum over the lanes above this one.
__device__ __forceinline__ u32 sum_above(u32 x, int lane) {
  u32 sum = x;
#pragma unroll
  for (int s = 1; s < 32; s <<= 1) { const u32 o = __shfl_down_sync(~0u, sum, s); if (lane + s < 32) sum += o; }
  return sum - x; }

// A count of every block of the cluster: their sum, and that of earlier blocks. One latency, not one a block.
struct Counts { u32 all, earlier; };
template <int BLOCKS> __device__ __forceinline__ Counts sum_blocks(const u32* count, int first, int rank, int size) {
  u32 v[BLOCKS];
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) v[i] = load_remote(count, first + i, first + i < size);
  Counts sum{0, 0};
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    sum.all += v[i];
    sum.earlier += first + i < rank ? v[i] : 0; }
  return sum; }

// One warp: the bin of the row's k-th largest key, first among sums of 32 bins, then among the 32.
template <int WARPS> __device__ __forceinline__ void find_threshold(SelectMemory<WARPS>& m, u32 k, int rank, int size, int lane) {
  // Two coarse bins a lane.
  const Counts low = sum_blocks<MOST_BLOCKS>(m.coarse + lane * 2, 0, rank, size);
  const Counts high = sum_blocks<MOST_BLOCKS>(m.coarse + lane * 2 + 1, 0, rank, size);
  u32 above = sum_above(low.all + high.all, lane);
  const bool upper = above < k && above + high.all >= k, lower = above + high.all < k && above + low.all + high.all >= k;
  const int found = __ffs(__ballot_sync(~0u, upper || lower)) - 1, coarse = __shfl_sync(~0u, lane * 2 + upper, found);
  above = __shfl_sync(~0u, above + (upper ? 0 : high.all), found);
  u32 over = warp_sum((lane * 2 > coarse ? low.earlier : 0) + (lane * 2 + 1 > coarse ? high.earlier : 0));
  const Counts bin = sum_blocks<MOST_BLOCKS>(m.histogram + coarse * 32 + lane, 0, rank, size);   // one bin a lane
  above += sum_above(bin.all, lane);
  const bool here = above < k && above + bin.all >= k;
  over += warp_sum(lane > __ffs(__ballot_sync(~0u, here)) - 1 ? bin.earlier : 0);
  if (here) { m.threshold = coarse * 32 + lane; m.ties = k - above; m.over_before = over; m.equal_before = bin.earlier; }
}

// Counts this block's keys in the threshold's bin by their fine bits.
template <int WARPS> __device__ __forceinline__ void count_fine(SelectMemory<WARPS>& m, const KeyPlaces& keys, int pages) {
  const u32 first = m.threshold << FINE_BITS;
  const int lane = threadIdx.x & 31;
  for (int page = (threadIdx.x >> 5) * 2 + (lane >> 4); page < pages; page += WARPS * 2) {
    const uint4 v = *(const uint4*)(keys.at(page) + (lane & 15) * 16);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    const u32 here = at_least(v, first) & ~at_least(v, first + FINE_BINS);
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (here >> i & 1) atomicAdd(&m.fine[words[i / 2] >> i % 2 * 16 & FINE_BINS - 1], 1u);
  }
}

// One warp: from the threshold's bin to the threshold itself.
template <int WARPS> __device__ __forceinline__ void refine_threshold(SelectMemory<WARPS>& m, int rank, int size, int lane) {
  const u32 k = m.ties, bin = m.threshold, over_before = m.over_before;
  static_assert(FINE_BINS <= 16, "half a warp a half of the blocks");
  constexpr int HALF = (MOST_BLOCKS + 1) / 2;
  Counts fine = sum_blocks<HALF>(m.fine + lane % FINE_BINS, lane / 16 * HALF, rank, size);
  fine.all += __shfl_xor_sync(~0u, fine.all, 16);
  fine.earlier += __shfl_xor_sync(~0u, fine.earlier, 16);
  if (lane >= FINE_BINS) fine = {0, 0};
  const u32 above = sum_above(fine.all, lane);
  const bool here = above < k && above + fine.all >= k;
  const u32 over = warp_sum(lane > __ffs(__ballot_sync(~0u, here)) - 1 ? fine.earlier : 0);
  if (here) { m.threshold = bin << FINE_BITS | lane; m.ties = k - above; m.over_before = over_before + over; m.equal_before = fine.earlier; }
}

// The histogram of this block's keys > 0 is in memory.histogram; slots start at first_slot.
template <int WARPS>
__device__ __forceinline__ void select_keys(SelectMemory<WARPS>& m, const KeyPlaces& keys, int pages, i64 first_slot,
                                            int k, int rank, int size, int* selected) {
  static_assert(sizeof(m) <= SELECT_BYTES, "the room that callers leave");
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  for (int i = w; i < COARSE_BINS; i += WARPS) {
    const u32 sum = warp_sum(m.histogram[i * 32 + lane]);
    if (lane == 0) m.coarse[i] = sum;
  }
  if (FINE_BITS && threadIdx.x < FINE_BINS) m.fine[threadIdx.x] = 0;
  cluster_sync();
  if (w == 0) find_threshold(m, k, rank, size, lane);
  __syncthreads();
  if (FINE_BITS) {
    count_fine(m, keys, pages);
    cluster_sync();
    if (w == 0) refine_threshold(m, rank, size, lane);
    __syncthreads();
  }
  cluster_arrive();   // this block has read what it needs of the others
  const u32 threshold = m.threshold, ties = m.ties;
  // Each warp owns a contiguous range of pages, two at a time, a lane eight keys. The bits of a page
  // take the place of its keys: 16 bytes of tokens above the threshold, 16 of tokens at it.
  const int per = (pages + WARPS - 1) / WARPS, begin = min(w * per, pages), end = min(begin + per, pages);
  u32 above = 0, equals = 0;
  constexpr int AHEAD = 4;   // loads under way
  for (int start = begin + (lane >> 4); start - (lane >> 4) < end; start += 2 * AHEAD) {
    uint4 v[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      v[i] = start + 2 * i < end ? *(const uint4*)(keys.at(start + 2 * i) + (lane & 15) * 16) : make_uint4(0, 0, 0, 0);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const u32 over = at_least(v[i], threshold + 1), equal = at_least(v[i], threshold) & ~over;
      u8* at = keys.at(start + 2 * i) + (lane & 15);
      if (start + 2 * i < end) { at[0] = (u8)over; at[16] = (u8)equal; }
      above += __popc(over);
      equals += __popc(equal);
    }
  }
  above = warp_sum(above);
  equals = warp_sum(equals);
  if (lane == 0) m.warp_counts[w] = make_uint2(above, equals);
  __syncthreads();
  allow_next();
  const uint2 earlier = lane < w ? m.warp_counts[lane] : make_uint2(0, 0);   // lane = warp
  u32 over_at = m.over_before + warp_sum(earlier.x), equal_at = m.equal_before + warp_sum(earlier.y);
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
  cluster_wait();   // the others are done with this block's memory
}
