// The balance of rows (codec/balance.py), once, from the first queries and keys of each. `measure` sums up
// squares of queries and takes the variance of keys, a block per row, KV head and 32 channels; `balance`
// makes the factors of them, a block per row and KV head.
constexpr int MEASURE_WARPS = 16;

struct BalanceParams {
  const void *query, *keys;                       // [B, H * groups, T, D], [B, H, N, D], last dimension contiguous
  i64 query_row, query_head, query_token;         // strides in elements
  i64 key_row, key_head, key_token;
  const float* before;                            // [B, H, D]: squares of the queries before
  float *square, *variance, *balance;             // [B, H, D]
  int queries, tokens, groups;                    // T, N
  float seen, limit;                              // queries of a row in all; largest factor
};

// Sum over the warps of what a lane of each has.
__device__ __forceinline__ float sum_of_warps(float (*parts)[32], float x) {
  const int lane = threadIdx.x & 31;
  __syncthreads();
  parts[threadIdx.x >> 5][lane] = x;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < MEASURE_WARPS; i++) sum += parts[i][lane];
  return sum;
}

extern "C" __global__ void __launch_bounds__(MEASURE_WARPS * 32) measure(const __grid_constant__ BalanceParams p) {
  __shared__ float parts[MEASURE_WARPS][32];
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, h = blockIdx.x / R, c = blockIdx.x % R * 32 + lane;
  const i64 row = blockIdx.y, at = row * gridDim.x * 32 + h * D + c;
  const i64 first_query = row * p.query_row + c, first_key = row * p.key_row + h * p.key_head + c;
  const auto key = [&](int i) { return load_input(p.keys, first_key + i * p.key_token); };
  float square = 0.f, sum = 0.f, spread = 0.f;
#pragma unroll 8
  for (int i = w; i < p.queries * p.groups; i += MEASURE_WARPS) {
    const int token = i / p.groups, head = h * p.groups + i % p.groups;
    const float x = load_input(p.query, first_query + head * p.query_head + token * p.query_token);
    square = fmaf(x, x, square);
  }
  square = sum_of_warps(parts, square);
#pragma unroll 8
  for (int i = w; i < p.tokens; i += MEASURE_WARPS) sum += key(i);
  const float mean = sum_of_warps(parts, sum) / (float)p.tokens;
#pragma unroll 8
  for (int i = w; i < p.tokens; i += MEASURE_WARPS) { const float x = key(i) - mean; spread = fmaf(x, x, spread); }
  spread = sum_of_warps(parts, spread);
  if (w > 0) return;
  p.square[at] = p.before[at] + square / (float)p.groups;
  p.variance[at] = spread / (float)p.tokens;
}

extern "C" __global__ void __launch_bounds__(D / 2) balance(const __grid_constant__ BalanceParams p) {
  __shared__ float ratios[D / 2], median;
  const int i = threadIdx.x, at = (blockIdx.y * gridDim.x + blockIdx.x) * D + i;
  if (i == 0) median = 1.f;   // of numbers that are none there is no middle one
  wait_previous();
  const float keys = sqrtf((p.variance[at] + p.variance[at + D / 2]) * 0.5f);
  const float queries = sqrtf((p.square[at] + p.square[at + D / 2]) / p.seen * 0.5f);
  const float ratio = keys > 0.f && queries > 0.f ? sqrtf(queries / fmaxf(keys, 1e-30f)) : 1.f;
  ratios[i] = ratio;
  __syncthreads();
  int rank = 0;
  for (int j = 0; j < D / 2; j++) rank += ratios[j] < ratio || (ratios[j] == ratio && j < i);
  if (rank == (D / 2 - 1) / 2) median = ratio;
  __syncthreads();
  const float factor = fminf(fmaxf(ratio / median, 1.f / p.limit), p.limit);
  p.balance[at] = factor;
  p.balance[at + D / 2] = factor;
}
