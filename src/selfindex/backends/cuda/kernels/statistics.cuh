// Sums of a prompt's centred sub-vectors of 4 channels by their sign code, and how many there are
// (codec/paper.py): a lane a group, with a table of its own in shared memory, so that nothing is added
// by atomics and the result does not depend on timing.
constexpr int STATISTICS_WARPS = 4, GROUPS = D / 4 < 32 ? D / 4 : 32, PARTS = 32 / GROUPS;   // tokens of a warp at a time
constexpr int HALVES = (D + 127) / 128;                // blocks that share the channels of a token

struct StatisticsParams {
  const void* keys;                                    // [H, tokens, D], strides in elements, channels dense
  i64 key_head, key_token;
  const float* mean;                                   // [H, D]
  float* sums;                                         // [splits, H, D / 4, 16, 5]: four sums, how many
  int heads, tokens, share;                            // share: tokens of a split, at most
};

extern "C" __global__ void __launch_bounds__(STATISTICS_WARPS * 32) code_sums(const __grid_constant__ StatisticsParams p) {
  __shared__ float table[STATISTICS_WARPS][16][5][32];
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, h = blockIdx.y / HALVES, first_group = blockIdx.y % HALVES * GROUPS;
  const int part = lane / GROUPS, channel = (first_group + lane % GROUPS) * 4;
  const bool live = part < PARTS;                      // of 96 channels a lane of four has none
  for (int i = tid; i < STATISTICS_WARPS * 16 * 5 * 32; i += STATISTICS_WARPS * 32) (&table[0][0][0][0])[i] = 0.f;
  __syncthreads();
  const int begin = blockIdx.x * p.share, end = min(begin + p.share, p.tokens);
  const float* at = p.mean + (i64)h * D + channel;
  const float4 mean = make_float4(at[0], at[1], at[2], at[3]);
  const i64 base = h * p.key_head + channel;
  constexpr int STEP = STATISTICS_WARPS * PARTS, AHEAD = 8;   // loads under way
  for (int start = begin + w * PARTS + part; start - part < end; start += STEP * AHEAD) {
    float4 x[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) x[i] = load4(p.keys, base + (i64)min(start + i * STEP, p.tokens - 1) * p.key_token);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (!live || start + i * STEP >= end) continue;
      const float a = x[i].x - mean.x, b = x[i].y - mean.y, c = x[i].z - mean.z, d = x[i].w - mean.w;
      float (*sum)[32] = table[w][(a >= 0.f) | (b >= 0.f) << 1 | (c >= 0.f) << 2 | (d >= 0.f) << 3];
      sum[0][lane] += a; sum[1][lane] += b; sum[2][lane] += c; sum[3][lane] += d;
      sum[4][lane] += 1.f;
    }
  }
  __syncthreads();
  float* to = p.sums + (((i64)blockIdx.x * p.heads + h) * (D / 4) + first_group) * 16 * 5;
  for (int i = tid; i < GROUPS * 16 * 5; i += STATISTICS_WARPS * 32) {
    const int group = i / 80, entry = i % 80;
    float sum = 0.f;
#pragma unroll
    for (int q = 0; q < STATISTICS_WARPS; q++)
#pragma unroll
      for (int r = 0; r < PARTS; r++) sum += (&table[q][0][0][0])[entry * 32 + r * GROUPS + group];
    to[i] = sum;
  }
}
