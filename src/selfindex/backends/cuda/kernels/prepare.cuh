// Query preparation, one block a KV head, one warp a query head:
//   q~ = R (q / s),   v = round(16256 q~ / max |q~|) = 128 hi + lo  (two signed bytes),
//   6-bit query for the score as bit planes; pages in use and tokens to select of the row.
extern "C" __global__ void __launch_bounds__(G < 4 ? 128 : 32 * G) prepare(const __grid_constant__ Params p) {
  __shared__ float line[G * LINE];
  __shared__ int most[2];   // pages in use, tokens
  const int row = blockIdx.x, b = row / p.heads, h = row % p.heads;
  const int lane = threadIdx.x & 31, g = threadIdx.x >> 5;
  if (threadIdx.x == 0) most[0] = most[1] = 0;
  __syncthreads();
  allow_next();
  // The query's loads are issued before the page counts', so that their latencies overlap.
  const int own = min(g, G - 1);
  const i64 at = b * p.query_row + (i64)(h * G + own) * p.query_head;
  const float* balance = p.balance + b * p.balance_row + h * D;
  float x[R], divisor[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    x[r] = load_input(p.query, at + r * 32 + lane);
    divisor[r] = balance[r * 32 + lane];
  }
  const int budget = p.budgets[b];
  int used = 0, tokens = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < p.pages; i += blockDim.x) {
    const int n = p.counts[(i64)b * p.pages + i];
    used = n > 0 ? i + 1 : used;
    tokens += max(n, 0);
  }
  used = __reduce_max_sync(~0u, used);
  tokens = warp_sum(tokens);
  if (lane == 0) { atomicMax(&most[0], used); atomicAdd(&most[1], tokens); }
  if (g < G) {
    float top = 0.f;
#pragma unroll
    for (int r = 0; r < R; r++) x[r] *= sign_of(r * 32 + lane, 1) * rotation_gain() / divisor[r];
    rotate(x, lane, line + g * (LINE > 1 ? LINE : 0));
#pragma unroll
    for (int r = 0; r < R; r++) top = fmaxf(top, fabsf(x[r]));
    top = fmaxf(warp_max(top), 1e-30f);
    const float inverse = QUERY_RANGE / top;
    const i64 head = (i64)row * G + g;
    u8* frag = p.qfrag + head * 2 * FRAGMENT;
    u8* natural = p.qnat + head * 2 * D;
    if (D == 96) for (int i = lane; i < CHUNK; i += 32) frag[3 * CHUNK + i] = frag[FRAGMENT + 3 * CHUNK + i] = 0;
    int sum = 0;
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int c = r * 32 + lane, v = __float2int_rn(x[r] * inverse), hi = (v + 64) >> 7, lo = v - (hi << 7);
      const int j = c / CHUNK, word = c % CHUNK / 16, rest = c % 16;
      const int place = (((j * WORDS + word) * 2 + (rest & 1)) * 2 + (rest >> 3)) * 4 + ((rest & 7) >> 1);
      frag[place] = (u8)hi;
      frag[FRAGMENT + place] = (u8)lo;
      natural[c] = (u8)hi;
      natural[D + c] = (u8)lo;
      const int coarse = min((v + (1 << (14 - PLANES))) >> (15 - PLANES), (1 << (PLANES - 1)) - 1);
      sum += coarse;
#pragma unroll
      for (int i = 0; i < PLANES; i++) {
        const u32 bits = __ballot_sync(~0u, coarse >> i & 1);
        if (lane == 0) p.planes[(head * PLANES + i) * R + r] = bits;
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) { p.qmeta[head * 2] = top / QUERY_RANGE; p.qmeta[head * 2 + 1] = (float)sum; }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    p.rowinfo[row * 2] = most[0];
    p.rowinfo[row * 2 + 1] = max(0, min(min(budget, p.width), most[1]));
    p.counter[row] = 0;
  }
}
