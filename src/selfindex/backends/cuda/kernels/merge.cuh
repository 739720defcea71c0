// The parts of a row's attention blocks become its output: a block a query head, a lane four
// neighbouring channels of every eighth part; then the sum is rotated back, where a preset rotates.
constexpr int MERGE_WARPS = 8;

extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32, 2) merge(const __grid_constant__ Params p) {
  constexpr int VECTORS = (D + 127) / 128, AHEAD = 4 / VECTORS;
  __shared__ __align__(16) float sums[MERGE_WARPS][VECTORS * 128];
  __shared__ float line[LINE];
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, head = blockIdx.x, row = blockIdx.y;
  const i64 out_row = (i64)(row / p.heads) * p.heads * G + (row % p.heads) * G + head, stride = (i64)G * (D + 4);
  const float* part = p.parts + ((i64)row * p.splits * G + head) * (D + 4);
  allow_next();
  wait_previous();
  const int splits = (p.take[row] + ATTEND_TOKENS - 1) / ATTEND_TOKENS;
  if (splits == 0) {   // nothing was attended to
    for (int c = threadIdx.x; c < D; c += MERGE_WARPS * 32) p.out[out_row * D + c] = 0.f;
    if (threadIdx.x == 0) p.lse[out_row] = -__int_as_float(0x7f800000);
    return;
  }
  float4 v[AHEAD][VECTORS], x[VECTORS];
  const auto fetch = [&](int first) {
#pragma unroll
    for (int n = 0; n < AHEAD; n++)
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
        const int c = i * 128 + lane * 4;
        v[n][i] = *(const float4*)(part + min(first + n * MERGE_WARPS, splits - 1) * stride + (D % 128 == 0 || c < D ? c : 0));
      }
  };
  fetch(w);   // on their way while the maximum is looked for
  float best = FAR, total = 0.f;
  for (int s = lane; s < splits; s += 32) best = fmaxf(best, part[s * stride + D]);
  best = warp_max(best);
#pragma unroll
  for (int i = 0; i < VECTORS; i++) x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int chunk = 0; chunk < splits; chunk += 32) {   // lane = part
    float factor = 0.f;
    if (chunk + lane < splits) {
      const float2 own = *(const float2*)(part + (chunk + lane) * stride + D);
      factor = ex2(own.x - best);
      total = fmaf(own.y, factor, total);
    }
    for (int first = w; first < 32 && chunk + first < splits; first += AHEAD * MERGE_WARPS) {
      if (chunk + first != w) fetch(chunk + first);
#pragma unroll
      for (int n = 0; n < AHEAD; n++) {
        const float f = __shfl_sync(~0u, factor, first + n * MERGE_WARPS);   // 0 past the last part
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
          x[i].x = fmaf(v[n][i].x, f, x[i].x); x[i].y = fmaf(v[n][i].y, f, x[i].y);
          x[i].z = fmaf(v[n][i].z, f, x[i].z); x[i].w = fmaf(v[n][i].w, f, x[i].w);
        }
      }
    }
  }
  static_assert(32 % (AHEAD * MERGE_WARPS) == 0, "a chunk's parts are whole rounds");
#pragma unroll
  for (int i = 0; i < VECTORS; i++) *(float4*)&sums[w][i * 128 + lane * 4] = x[i];
  __syncthreads();
  if (w > 0) return;
  float sum[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    sum[r] = 0.f;
#pragma unroll
    for (int i = 0; i < MERGE_WARPS; i++) sum[r] += sums[i][r * 32 + lane];
  }
  total = warp_sum(total);
  rotate_back(sum, lane, line);
  const float gain = rotation_gain() / total;
#pragma unroll
  for (int r = 0; r < R; r++) p.out[out_row * D + r * 32 + lane] = sum[r] * gain * sign_of(r * 32 + lane, 2);
  const float offset = PAPER ? p.offsets[(i64)row * G + head] * p.scale : 0.f;   // what all logits lack
  if (lane == 0) p.lse[out_row] = (best + lg2(total) + offset) * 0.69314718f;
}
