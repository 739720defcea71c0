// Pages in use and tokens in them of a row, in a block's shared memory: used and tokens of `m`. Counting
// begins with zeros there, by `threads` threads from `first` on.
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
// Tokens to select, of a budget and the tokens counted.
__device__ __forceinline__ int within_budget(const Params& p, int budget, int tokens) { return max(0, min(min(budget, p.width), tokens)); }
