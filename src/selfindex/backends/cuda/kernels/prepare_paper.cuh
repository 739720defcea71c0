// Query preparation of the paper preset, by every block for its own row. A token's score is a sum over
// groups of 4 channels of a table of 16 entries, the codebook times the group's mean query; the table is
// also
//   T[code] = c + sum over the 15 sets S of bits of u_S parity(code & S),    u_S = -1/8 sum_code T[code] (-1)^parity(code & S)
// and parities of all 8 groups of a word are a few exclusive-ors of the word with itself. So a score is
// a product of bits and weights u, which 16-bit integers keep as bit planes (score_paper.cuh). c does not
// change the order. A parity has its bit in one of four feature words, at the place 4 group + bit:
//   {b}     {b, b-1}     {b, b-1, b-2}     {0,2} {1,3} - {0,1,2,3}      bits of a group, modulo 4
constexpr int FEATURES = 4;                 // words
constexpr int LARGEST_WEIGHT = 32767;

struct QueryMemory {
  float mean[D];                            // query of the row's heads
  int weights[D / 4][16];                   // of the sets of a group's bits
  u32 planes[16][FEATURES][R];              // bit, feature word, word of 32 channels
  float largest[16];                        // of a warp
  int least, range;                         // least possible sum of weights, and from there to the largest
  int used, tokens;                         // pages in use, tokens in them
};

// Everything in QueryMemory; one block of a row publishes how many tokens are selected. Calls `begin` with
// the pages in use once they are known, and returns the tokens to select; where that is 0, it did not.
template <int WARPS, class Begin> __device__ __forceinline__ int prepare_row(const Params& p, int row, QueryMemory& m, bool publish, const Begin& begin) {
  constexpr int THREADS = WARPS * 32, ENTRIES = 4 * D, OWN = (ENTRIES + THREADS - 1) / THREADS;   // of the tables, a multiple of a warp
  const int b = row / p.heads, h = row % p.heads, tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  const float* codebook = p.constants + b * p.constants_row + (i64)h * CONSTANTS + 2 * D;
  if (tid == 0) m.used = m.tokens = m.least = m.range = 0;
  __syncthreads();
  wait_previous();
  const int budget = p.budgets[b];
  float centroid[OWN][4];   // on their way while the query comes
#pragma unroll
  for (int n = 0; n < OWN; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) centroid[n][c] = codebook[min(tid + n * THREADS, ENTRIES - 1) * 4 + c];
  if (tid < D) {   // the other threads count meanwhile, if there are any
    float sum = 0.f;
#pragma unroll
    for (int g = 0; g < G; g++) sum += load_input(p.query, b * p.query_row + (i64)(h * G + g) * p.query_head + tid);
    m.mean[tid] = sum / G;
  }
  if (THREADS <= D) count_tokens(p, b, m, 0, THREADS);
  else if (tid >= D) count_tokens(p, b, m, D, THREADS - D);
  __syncthreads();
  const int take = within_budget(p, budget, m.tokens);
  if (publish && tid == 0) p.take[row] = take;
  if (take == 0) return 0;
  begin(m.used);   // the first pages come while the tables are made
  // The transform runs over 16 neighbouring lanes.
  const float sign = p.scale > 0.f ? -1.f : p.scale < 0.f ? 1.f : 0.f;
  float largest = 0.f;
#pragma unroll
  for (int n = 0; n < OWN; n++) {
    const int i = tid + n * THREADS;
    if (i >= ENTRIES) break;
    float x = 0.f;
#pragma unroll
    for (int c = 0; c < 4; c++) x = fmaf(centroid[n][c], m.mean[i / 16 * 4 + c], x);
#pragma unroll
    for (int s = 1; s < 16; s <<= 1) {
      const float other = __shfl_xor_sync(~0u, x, s);
      x = lane & s ? other - x : x + other;
    }
    x = lane & 15 ? x * sign : 0.f;
    m.weights[i / 16][i % 16] = __float_as_int(x);
    largest = fmaxf(largest, fabsf(x));
  }
  largest = warp_max(largest);
  if (lane == 0) m.largest[w] = largest;
  __syncthreads();
  largest = 1e-30f;
#pragma unroll
  for (int i = 0; i < WARPS; i++) largest = fmaxf(largest, m.largest[i]);
  int least = 0, range = 0;
  for (int i = tid; i < ENTRIES; i += THREADS) {
    int& weight = m.weights[i / 16][i % 16];
    weight = __float2int_rn(__int_as_float(weight) * (LARGEST_WEIGHT / largest));
    least += min(weight, 0);
    range += abs(weight);
  }
  least = warp_sum(least);
  range = warp_sum(range);
  if (lane == 0) { atomicAdd(&m.least, least); atomicAdd(&m.range, range); }
  __syncthreads();
  for (int unit = w; unit < FEATURES * R; unit += WARPS) {   // lane = bit of a feature word
    const int feature = unit / R, word = unit % R;
    const u32 sets = feature == 0 ? 0x8421 : feature == 1 ? 0xC639 : feature == 2 ? 0xE7BD : 0xF0A5;
    const int weight = m.weights[word * 8 + (lane >> 2)][sets >> 4 * (lane & 3) & 15];
    u32 own = 0;   // lane = bit of the weights
#pragma unroll
    for (int bit = 0; bit < 16; bit++) {
      const u32 plane = __ballot_sync(~0u, weight >> bit & 1);
      if (lane == bit) own = plane;
    }
    if (lane < 16) m.planes[lane][feature][word] = own;
  }
  __syncthreads();
  return take;
}
