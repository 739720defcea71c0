// Pages in use, tokens in them and tokens to select of a row, in a block's shared memory: used, tokens
// and take of `m`. Counting begins with zeros there, by `threads` threads from `first` on.
template <class Memory> __device__ __forceinline__ void count_tokens(const Params& p, int b, Memory& m, int first, int threads) {
  int used = 0, tokens = 0;
#pragma unroll 8
  for (int i = threadIdx.x - first; i < p.pages; i += threads) {
    const int n = p.counts[(i64)b * p.pages + i];
    used = n > 0 ? i + 1 : used;
    tokens += max(n, 0);
  }
  used = __reduce_max_sync(~0u, used);
  tokens = warp_sum(tokens);
  if ((threadIdx.x & 31) == 0) { atomicMax(&m.used, used); atomicAdd(&m.tokens, tokens); }
}
// By all threads, behind a barrier after the count; ends with one.
template <class Memory> __device__ __forceinline__ void fix_budget(const Params& p, int row, Memory& m, int budget, bool publish) {
  if (threadIdx.x == 0) {
    m.take = max(0, min(min(budget, p.width), m.tokens));
    if (publish) p.take[row] = m.take;
  }
  __syncthreads();
}
