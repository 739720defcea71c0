// Attention of many new queries to every encoded token, decoded on the fly into the registers that
// the tensor cores multiply (m16n8k16, fp16 inputs, float32 sums):
//   x_t = (sum_c level_tc q~_c) scale_t + q~.mean + log2(value_base),     out = sum_t 2^x_t v_t
// where keys of the paper preset have no scale, but levels of their own for 32 channels.
// A block owns a tile of query rows of one KV head and every splits-th page. Its warps share the
// rows (long chunks) or, where one 16-row tile holds all rows, the tokens of a page. Levels, means
// and value codes are small integers, exact in fp16; queries and probabilities are rounded to it.
// Values are summed over their page's base (paper: their own), which joins the exponent: so are
// probabilities of very different values kept in fp16's range.
constexpr int DENSE_WARPS = 4, DENSE_THREADS = 32 * DENSE_WARPS, STEPS = D / 16;
constexpr int WIDE_TILES = D == 256 ? 1 : 2;           // 16-row tiles a warp of the wide kernel

__device__ __forceinline__ void mma_halves(float* c, const uint4& a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1)); }

// Value levels of one 16-token step, for 8 channels of this lane: b[c] of channel c, two tokens a
// word. v=2: 2 code - 3, v=3: +-13 .. +-114.
#if VALUE_BITS == 3
__device__ __forceinline__ void value_pairs(u32* b, const u32* v0, const u32* v1, const u32* s0, const u32* s1, int eight) {
  const bool upper = eight & 1;
  u32 at[2][2];
  places(at[0], v0[eight / 2], s0[eight / 4], eight & 2);
  places(at[1], v1[eight / 2], s1[eight / 4], eight & 2);
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    u32 x[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) levels(at[i][odd] >> (upper ? 16 : 0), x[i][0], x[i][1]);
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      b[odd + 4 * pair] = prmt(x[0][pair], x[1][pair], 0x5410);
      b[odd + 4 * pair + 2] = prmt(x[0][pair], x[1][pair], 0x7632);
    }
  }
}
#else
__device__ __forceinline__ void value_pairs(u32* b, const u32* v0, const u32* v1, int eight) {
  code_pairs(b, prmt(v0[eight / 2], v1[eight / 2], eight & 1 ? 0x7632 : 0x5410)); }
#endif

// ROW_WARPS warps along the query rows, each with TILES tiles of 16; the others along the tokens.
template <int ROW_WARPS, int TILES> __device__ __forceinline__ void attend_to_pages(const DenseParams& p) {
  constexpr int TOKEN_WARPS = DENSE_WARPS / ROW_WARPS, ROWS = ROW_WARPS * TILES * 16;
  extern __shared__ __align__(16) u8 memory[];
  __shared__ float line[DENSE_WARPS * LINE], reduce[DENSE_WARPS];
  __shared__ int last;
  u16* fragments = (u16*)memory;
  u8* stages = memory + ROWS * D * 2;
  float* scales = (float*)(stages + 2 * STAGE);          // [2, PAGE] of keys and values, by reader; paper: logarithm and inverse of the base
#if PAPER
  LevelTable* tables = (LevelTable*)(scales + 2 * PAGE); // [PAGE, R]
  u32* lines = (u32*)(tables + PAGE * R);                // [PAGE, R]
#endif
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, g = lane >> 2, j = lane & 3;
  const int row_warp = w % ROW_WARPS, token_warp = w / ROW_WARPS;
  const int split = blockIdx.x % p.splits, first = blockIdx.x / p.splits * ROWS;
  const int b = blockIdx.y / p.heads, h = blockIdx.y % p.heads;
  const int* counts = p.counts + (i64)b * p.pages;
  const auto start_copy = [&](int page, int stage) {
    const i64 block = p.table[(i64)b * p.pages + page];
    const u8* index = p.index + block * p.index_stride + (i64)h * INDEX_RECORD;
    const u8* payload = p.payload + block * p.payload_stride + (i64)h * PAYLOAD_RECORD;
    u8* to = stages + stage * STAGE;
    for (int i = tid; i < INDEX_RECORD / 16; i += DENSE_THREADS) copy_async(to + i * 16, index + i * 16);
    for (int i = tid; i < PAYLOAD_RECORD / 16; i += DENSE_THREADS) copy_async(to + INDEX_RECORD + i * 16, payload + i * 16);
  };
  const auto next_page = [&](int page) {
    do page += p.splits; while (page < last && counts[page] <= 0);
    return page;
  };
  const bool early = counts[split] > 0;                  // the first page, as a rule: do not wait for the others' counts
  if (early) start_copy(split, 0);
  if (tid == 0) last = 0;
  __syncthreads();
  int used = 0;                                          // pages up to the last one with tokens
  for (int i = split + tid * p.splits; i < p.pages; i += DENSE_THREADS * p.splits) used = counts[i] > 0 ? i + 1 : used;
  used = __reduce_max_sync(~0u, used);
  if (lane == 0) atomicMax(&last, used);
  __syncthreads();
  allow_next();
  int page = early ? split : next_page(split), stage = 0;
  if (!early && page < last) start_copy(page, 0);
  // Fragments as the tensor cores read them: [16-row tile][step][lane][4 words].
  const float unit = KEY_GAIN * p.scale * load_queries<ROWS, DENSE_WARPS>(p, first, line, reduce, [&](int row, int c, u16 value) {
    const int owner = row % 8 * 4 + c / (8 * R), step = c % (8 * R) / 8 * 2 + (c & 1), e = c % 8 / 2;
    const int word = (e & 2) + row % 16 / 8;
    fragments[((((row / 16) * STEPS + step) * 32 + owner) * 4 + word) * 2 + (e & 1)] = value;
  });

  float sum[TILES][D / 8][4], top[TILES][2], total[TILES][2];
#pragma unroll
  for (int m = 0; m < TILES; m++) {
    top[m][0] = top[m][1] = FAR;
    total[m][0] = total[m][1] = 0.f;
#pragma unroll
    for (int t = 0; t < D / 8; t++) sum[m][t][0] = sum[m][t][1] = sum[m][t][2] = sum[m][t][3] = 0.f;
  }
  const uint4* query = (const uint4*)fragments + row_warp * TILES * STEPS * 32 + lane;
  while (page < last) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    const u8 *index = stages + stage * STAGE, *payload = index + INDEX_RECORD;
    const int count = min(counts[page], PAGE);
    page = next_page(page);
    stage ^= 1;
    if (page < last) start_copy(page, stage);
    const int to = (tid & ~31) + (tid & 3) * 8 + (tid & 31) / 4;   // token 4 m + j of 32 is the m-th of lane j
#if PAPER
    {   // a power of two, not below any value
      const u32 exponent = (__float_as_uint(value_bound(payload, tid)) >> 23) + 1;
      const float inverse = __uint_as_float((254 - exponent) << 23);
      scales[to] = (float)((int)exponent - 127);
      scales[PAGE + to] = inverse;
#pragma unroll
      for (int r = 0; r < R; r++) {
        tables[tid * R + r] = level_table(payload, tid, r);
        lines[tid * R + r] = value_line(payload, tid, r, inverse);
      }
    }
    __syncthreads();
#else
    const float* consts = (const float*)(index + CONSTS);
    const float base = fmaxf(consts[2], 1e-20f);
    {
      scales[to] = scale_of(index[KEY_SCALES + tid]) * consts[1] * LEVEL_UNIT * unit;
      scales[PAGE + to] = scale_of(payload[VALUE_SCALES + tid]) * (consts[2] / base);
    }
    __syncthreads();
    // q.mean of the page: every column of this product is the same.
    float offset[TILES][4];
#pragma unroll
    for (int m = 0; m < TILES; m++) offset[m][0] = offset[m][1] = offset[m][2] = offset[m][3] = 0.f;
#pragma unroll
    for (int u = 0; u < R; u++) {
      const uint2 mean = *(const uint2*)(index + MEAN + 8 * (R * j + u));
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const u32 pick = odd ? 0x4341 : 0x4240;          // 1024 + 128 + code - 1152
        const u32 b0 = fma_halves(prmt(mean.x ^ 0x80808080u, 0x64646464u, pick), 0x3C003C00u, 0xE480E480u);
        const u32 b1 = fma_halves(prmt(mean.y ^ 0x80808080u, 0x64646464u, pick), 0x3C003C00u, 0xE480E480u);
#pragma unroll
        for (int m = 0; m < TILES; m++) mma_halves(offset[m], query[(m * STEPS + 2 * u + odd) * 32], b0, b1);
      }
    }
    float shift[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      shift[m][0] = fmaf(offset[m][0], consts[0] * unit, lg2(base));
      shift[m][1] = fmaf(offset[m][2], consts[0] * unit, lg2(base));
    }
    const float base_inverse = 1.f / base;
#endif
#pragma unroll 1
    for (int part = token_warp; part * 32 < count; part += TOKEN_WARPS) {
      // Column c of the i-th 8 tokens is token 4 (2 i + c % 2) + c / 2 of the 32.
      u32 magnitudes[4][KEY_WORDS], signs[4][SIGN_WORDS];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = part * 32 + 4 * (2 * i + (g & 1)) + (g >> 1);
        load_bytes<2 * R>(magnitudes[i], payload + token * TOKEN + 2 * R * j);
        load_bytes<R>(signs[i], index + token * CODE + R * j);
      }
      float x[TILES][4][4];
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[m][i][0] = x[m][i][1] = x[m][i][2] = x[m][i][3] = 0.f;
#pragma unroll
      for (int word = 0; word < KEY_WORDS; word++) {
        u32 at[4][2];
#pragma unroll
        for (int i = 0; i < 4; i++) places(at[i], magnitudes[i][word], signs[i][word / 2], word & 1);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int odd = 0; odd < 2; odd++) {
            const int u = 2 * word + half;
            if (u >= R) continue;
            uint4 q[TILES];
#pragma unroll
            for (int m = 0; m < TILES; m++) q[m] = query[(m * STEPS + 2 * u + odd) * 32];
#pragma unroll
            for (int i = 0; i < 4; i++) {
              u32 b0, b1;
#if PAPER
              const int token = part * 32 + 4 * (2 * i + (g & 1)) + (g >> 1);
              levels(at[i][odd] >> 16 * half, b0, b1, tables[token * R + (R * j + u) / 4]);
#else
              levels(at[i][odd] >> 16 * half, b0, b1);
#endif
#pragma unroll
              for (int m = 0; m < TILES; m++) mma_halves(x[m][i], q[m], b0, b1);
            }
          }
      }
      float key_scale[8], value_scale[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) *(float4*)(key_scale + i) = *(const float4*)(scales + part * 32 + j * 8 + i);
      const bool partial = part * 32 + 32 > count;
      bool grows = false;
      float peak[TILES][2];
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          peak[m][r] = FAR;
#pragma unroll
          for (int k = 0; k < 8; k++) {
            float& logit = x[m][k / 2][2 * r + k % 2];
#if PAPER
            logit = fmaf(logit, unit, key_scale[k]);
#else
            logit = fmaf(logit, key_scale[k], shift[m][r]);
#endif
            if (partial && part * 32 + 4 * k + j >= count) logit = FAR;
            peak[m][r] = fmaxf(peak[m][r], logit);
          }
          peak[m][r] = fmaxf(peak[m][r], __shfl_xor_sync(~0u, peak[m][r], 1));
          peak[m][r] = fmaxf(peak[m][r], __shfl_xor_sync(~0u, peak[m][r], 2));
          grows |= peak[m][r] > top[m][r] + SLACK;
        }
      if (__any_sync(~0u, grows)) {
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const float higher = fmaxf(top[m][r], peak[m][r]), factor = ex2(top[m][r] - higher);
            top[m][r] = higher;
            total[m][r] *= factor;
#pragma unroll
            for (int t = 0; t < D / 8; t++) { sum[m][t][2 * r] *= factor; sum[m][t][2 * r + 1] *= factor; }
          }
      }
      __syncwarp();   // keeps loads of values behind the logits, whose registers they need
#pragma unroll
      for (int i = 0; i < 8; i += 4) *(float4*)(value_scale + i) = *(const float4*)(scales + PAGE + part * 32 + j * 8 + i);
      uint4 weights[TILES][2];
#pragma unroll
      for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int k = 0; k < 8; k++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            float& logit = x[m][k / 2][2 * r + k % 2];
            const float e = ex2(logit - top[m][r]);
#if PAPER
            total[m][r] = fmaf(e, value_scale[k], total[m][r]);
            logit = e;
#else
            total[m][r] = fmaf(e, base_inverse, total[m][r]);
            logit = e * value_scale[k];
#endif
          }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float *lo = x[m][2 * i], *hi = x[m][2 * i + 1];
          weights[m][i] = make_uint4(halves(lo[0], lo[1]), halves(lo[2], lo[3]), halves(hi[0], hi[1]), halves(hi[2], hi[3]));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        __syncwarp();
        u32 codes[4][CODE_WORDS];
#pragma unroll
        for (int k = 0; k < 4; k++)
          load_bytes<R>(codes[k], payload + (part * 32 + 4 * (4 * i + k) + j) * TOKEN + D / 4 + R * g);
#if VALUE_BITS == 3
        u32 up[4][(R + 7) / 8];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const u8* from = payload + (part * 32 + 4 * (4 * i + k) + j) * TOKEN + D / 2;
          if constexpr (D == 96) up[k][0] = (from[3 * g / 2] | from[3 * g / 2 + 1] << 8) >> (g & 1) * 4;
          else load_bytes<R / 2>(up[k], from + R / 2 * g);
        }
#endif
#pragma unroll
        for (int eight = 0; eight * 8 < D / 8; eight++) {
          u32 b0[8], b1[8];
#if VALUE_BITS == 3
          value_pairs(b0, codes[0], codes[1], up[0], up[1], eight);
          value_pairs(b1, codes[2], codes[3], up[2], up[3], eight);
#else
          value_pairs(b0, codes[0], codes[1], eight);
          value_pairs(b1, codes[2], codes[3], eight);
#endif
#if PAPER
#pragma unroll
          for (int four = 0; four < 2 && eight * 8 + four * 4 < D / 8; four++) {
            u32 line[4];
#pragma unroll
            for (int k = 0; k < 4; k++) line[k] = lines[(part * 32 + 4 * (4 * i + k) + j) * R + (R * g + 2 * eight + four) / 8];
#pragma unroll
            for (int c = 4 * four; c < 4 * four + 4; c++) {
              b0[c] = fma_halves(b0[c], prmt(line[0], line[1], 0x5410), prmt(line[0], line[1], 0x7632));
              b1[c] = fma_halves(b1[c], prmt(line[2], line[3], 0x5410), prmt(line[2], line[3], 0x7632));
            }
          }
#endif
#pragma unroll
          for (int c = 0; c < 8 && eight * 8 + c < D / 8; c++)
#pragma unroll
            for (int m = 0; m < TILES; m++) mma_halves(sum[m][eight * 8 + c], weights[m][i], b0[c], b1[c]);
        }
      }
    }
  }

  __syncthreads();                                       // pages and queries make room for the sums
  float* mine = (float*)memory + w * 16 * PART;
#pragma unroll
  for (int m = 0; m < TILES; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float* to = mine + (g + 8 * r) * PART;
#pragma unroll
      for (int t = 0; t < D / 8; t++) {
        to[D / 8 * (2 * j) + t] = sum[m][t][2 * r];
        to[D / 8 * (2 * j + 1) + t] = sum[m][t][2 * r + 1];
      }
      float all = total[m][r];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      if (j == 0) { to[D] = top[m][r]; to[D + 1] = all; }
    }
    __syncthreads();
    for (int i = TOKEN_WARPS > 1 ? w : 0; i < 16; i += TOKEN_WARPS) {
      const int row = first + (row_warp * TILES + m) * 16 + i;
      if (row >= p.groups * p.queries) break;
      const float* from = TOKEN_WARPS > 1 ? (float*)memory + i * PART : mine + i * PART;
      float best = FAR, all = 0.f, y[R];
#pragma unroll
      for (int q = 0; q < TOKEN_WARPS; q++) best = fmaxf(best, from[q * 16 * PART + D]);
#pragma unroll
      for (int r = 0; r < R; r++) y[r] = 0.f;
#pragma unroll
      for (int q = 0; q < TOKEN_WARPS; q++) {
        const float factor = ex2(from[q * 16 * PART + D] - best);
        all = fmaf(from[q * 16 * PART + D + 1], factor, all);
#pragma unroll
        for (int r = 0; r < R; r++) y[r] = fmaf(from[q * 16 * PART + r * 32 + lane], factor, y[r]);
      }
      store_row(p, y, best, all, row, split, line + w * (LINE > 1 ? LINE : 0));
    }
    __syncthreads();
  }
}

// The host gives kernels whose name starts with "decode" all of a block's shared memory.
extern "C" __global__ void __launch_bounds__(DENSE_THREADS, 2) decode_all_wide(const __grid_constant__ DenseParams p) {
  attend_to_pages<DENSE_WARPS, WIDE_TILES>(p); }
extern "C" __global__ void __launch_bounds__(DENSE_THREADS, D > 128 ? 2 : 3) decode_all_narrow(const __grid_constant__ DenseParams p) {
  attend_to_pages<1, 1>(p); }
