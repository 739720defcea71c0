// Query preparation, by every block for its own row, a warp a query head:
//   q~ = R (q / s),   v = round(16256 q~ / max |q~|) = 128 hi + lo  (two signed bytes),
//   a coarser query of 81 levels for the score as bit planes.
struct QueryMemory {
  // Query bytes in channel order, zero (as all below) for heads that only fill up a quad; rows
  // padded so that the eight a warp reads at once lie in different banks.
  __align__(16) u8 natural[HEADS][2][D + 16];
  u32 planes[HEADS][2][4 * R + 4];   // [upper, lower digits][of them upper, lower; 2 signs; R] bit planes, likewise
  float step[HEADS];             // of the 15-bit query
  int sum[HEADS];                // over channels, of 27 |digit 3| + 9 |digit 2| + 3 |digit 1| + |digit 0|
  int used, tokens;              // pages in use, tokens in them
  bool ragged;                   // a page of the block is not full
};

// line: 2 D floats of this warp's own shared memory, for the head dimensions whose rotation needs them.
__device__ __forceinline__ void prepare_head(const Params& p, int row, int g, QueryMemory& m, float* line, bool publish) {
  const int b = row / p.heads, h = row % p.heads, lane = threadIdx.x & 31;
  const i64 at = b * p.query_row + (i64)(h * G + g) * p.query_head;
  const float* balance = p.constants + b * p.constants_row + h * D;
  float x[R], divisor[R], top = 0.f;
#pragma unroll
  for (int r = 0; r < R; r++) {
    x[r] = load_input(p.query, at + r * 32 + lane);
    divisor[r] = balance[r * 32 + lane];
  }
#pragma unroll
  for (int r = 0; r < R; r++) x[r] *= sign_of(r * 32 + lane, 1) * rotation_gain() * reciprocal(divisor[r]);
  rotate(x, lane, line);
#pragma unroll
  for (int r = 0; r < R; r++) top = fmaxf(top, fabsf(x[r]));
  top = fmaxf(warp_max(top), 1e-30f);
  const float inverse = QUERY_RANGE / top;
  u8* frag = p.qfrag + ((i64)row * G + g) * 2 * FRAGMENT;
  if (D == 96 && publish) for (int i = lane; i < CHUNK; i += 32) frag[3 * CHUNK + i] = frag[FRAGMENT + 3 * CHUNK + i] = 0;
  int sum = 0;
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int c = r * 32 + lane, v = __float2int_rn(x[r] * inverse), hi = (v + 64) >> 7, lo = v - (hi << 7);
    const int j = c / CHUNK, word = c % CHUNK / 16, of_word = c % 16;
    const int place = (((j * WORDS + word) * 2 + (of_word & 1)) * 2 + (of_word >> 3)) * 4 + ((of_word & 7) >> 1);
    if (publish) { frag[place] = (u8)hi; frag[FRAGMENT + place] = (u8)lo; }
    m.natural[g][0][c] = (u8)hi;
    m.natural[g][1][c] = (u8)lo;
    const int coarse = __float2int_rn((float)v * (COARSE / QUERY_RANGE));
    int rest = coarse;
#pragma unroll
    for (int i = 0, weight = 27; i < 4; i++, weight /= 3) {
      const int digit = 2 * rest > weight ? 1 : 2 * rest < -weight ? -1 : 0;
      rest -= digit * weight;
      sum += digit ? weight : 0;
      const u32 positive = __ballot_sync(~0u, digit > 0), negative = __ballot_sync(~0u, digit < 0);
      if (lane < 2) m.planes[g][i / 2][(i % 2 * 2 + lane) * R + r] = lane ? negative : positive;
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) {
    m.step[g] = top / QUERY_RANGE;
    m.sum[g] = sum;
    if (publish) p.qstep[(i64)row * G + g] = top / QUERY_RANGE;
  }
}

// Everything in QueryMemory; one block of a row publishes what the attention needs of it. Calls `begin`
// with the pages in use once they are known, and returns the tokens to select; where that is 0, it did not.
template <int WARPS, class Begin> __device__ __forceinline__ int prepare_row(const Params& p, int row, QueryMemory& m, bool publish, const Begin& begin) {
  __shared__ float lines[LINE > 1 ? WARPS * LINE : 1];
  const int b = row / p.heads, w = threadIdx.x >> 5;
  if (G < HEADS) for (int i = threadIdx.x; i < (int)(sizeof(QueryMemory) / 4); i += WARPS * 32) ((u32*)&m)[i] = 0;
  if (G < HEADS) __syncthreads();
  if (threadIdx.x == 0) { m.used = m.tokens = 0; m.ragged = false; }
  __syncthreads();
  wait_previous();
  const int budget = p.budgets[b];
  for (int g = w; g < G; g += WARPS) prepare_head(p, row, g, m, lines + w * (LINE > 1 ? LINE : 0), publish);
  // The other warps count meanwhile, if there are any.
  if (G >= WARPS) count_tokens(p, b, m, 0, WARPS * 32);
  else if (w >= G) count_tokens(p, b, m, G * 32, (WARPS - G) * 32);
  __syncthreads();
  const int take = within_budget(p, budget, m.tokens);
  if (publish && threadIdx.x == 0) p.take[row] = take;
  if (take > 0) begin(m.used);
  return take;
}
