// Estimated attention of every token of a block's pages, from the index alone, a warp a page:
//   logit[head, t] = scale_t a sum_c (+-1)_tc q~_c + q~.mean,      a = SIGN_GAIN
// The sum over channels is a binary matrix product (and + population count): the sign codes meet the
// plane of a digit's ones, their complement that of its negative ones, in one product of twice the
// depth. A head's columns are neighbours: its two upper digits, its two lower ones; two products.
// Probabilities are kept as 8-bit floats (5 exponent, 3 mantissa bits) relative to their page's
// maximum.
//
// Codes of a page (chunk): [QUADS][4 rounds][32 lanes] words, lane = g * 4 + head of the quad; then
// the page maximum of each head, float32, log2 units. Code i of a word belongs to token
// 32 round + 4 g + (i ^ mix(g)): so the rows of a product lie in different banks, and a lane's
// scales in one word. Codes 0 and 1 are at bits 4 and 20, codes 2 and 3 at bits 12 and 28 (wrapped):
// two at a time become bfloat16 by a mask.
constexpr bool COUNTS_WHILE_SCORING = false;   // but when the whole row has been scored
constexpr int CHUNK_BYTES = 528 * QUADS;
constexpr int CHUNK_MAXIMA = 512 * QUADS;
constexpr int STEPS = (D + 127) / 128;     // binary products of 128 channels
constexpr int MEAN_WORDS = D / 16;         // words of the page mean a lane holds
constexpr float TOP = 11.f;                // log2 of a page's largest code: 16 of them add up in half precision
constexpr u32 FAR_HALF = 0xF753F753;       // -30000, twice: a token that does not exist
constexpr u32 CODE_PAIR = 0x0ff00ff0;
constexpr int FLOAT_BIAS = 0x4B400000;     // 1.5 * 2^23: an integer added to these bits is added to the float

__device__ __forceinline__ int mix(int g) { return g >> 1 & 3; }

__device__ __forceinline__ void binary_mma(int* d, u32 a0, u32 a1, u32 positive, u32 negative, const int* c) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(~a0), "r"(~a1), "r"(positive), "r"(negative), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])); }

// Sign words of tokens 2 t and 2 t + 1 of a lane in this round, channels 128 step + 32 j .... Pairs,
// not four at once, so that a word and its complement meet in one run of registers without copies.
__device__ __forceinline__ int sign_place(int lane) {
#if D == 128   // of a row that this lane points at
  return (4 * (lane & 7) + ((lane >> 3 & 1) ^ mix(lane & 7))) * CODE;
#else
  return 4 * (lane >> 2) * CODE + (lane & 3) * 4;
#endif
}
__device__ __forceinline__ void load_signs(u32* a, u32 signs, int order, int round, int step, int t) {
#if D == 128
  // The second pair's tokens are those of the first, exclusive-or 2: 32 bytes further or back.
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];" : "=r"(a[0]), "=r"(a[1]) : "r"((signs ^ t * 2 * CODE) + round * 32 * CODE));
#else
#pragma unroll
  for (int i = 0; i < 2; i++)   // words past the head meet zero planes
    a[i] = load_shared(signs + ((2 * t + i) ^ order) * CODE + round * 32 * CODE + step * 16);
#endif
}

__device__ __forceinline__ void load_mean_words(u32* to, u32 at) {
#pragma unroll
  for (int i = 0; i < MEAN_WORDS; i += D == 96 ? 2 : 4) D == 96 ? load_shared2(to + i, at + i * 4) : load_shared4(to + i, at + i * 4);
}

// What a lane needs of the query, for one quad of heads.
struct QueryPart {
  u32 plane[STEPS][2][2];   // [step][upper, lower][ones, negative ones] of this column's two digits
  int start[4];   // of the accumulators
  float gain;

  __device__ __forceinline__ void load(const Params& p, const QueryMemory& query, int quad, int lane) {
    const int g = lane >> 2, j = lane & 3, column = quad * 4 + (g >> 1), head = quad * 4 + j;
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
      for (int i = 0; i < 4; i++) plane[s][i / 2][i & 1] = s * 4 + j < R ? query.planes[column][g & 1][i * R + s * 4 + j] : 0;
    gain = query.step[head] * p.scale * SELECT_SHARPNESS;
    // Zero that the compiler does not know: it would set the registers anew for every product.
    start[0] = start[2] = p.cluster >> 16;
    start[1] = start[3] = FLOAT_BIAS - query.sum[head] / 2;
  }
};

template <int WARPS> struct Summary {
  float2 totals[WARPS][HEADS];   // largest logit, sum relative to it; of a warp's pages
  float2 block_totals[HEADS];
  float shift[HEADS];
};

template <int WARPS>
__device__ __forceinline__ void score_pages(const Params& p, const Block& block, PageReader<WARPS>& reader, u32 resident, u8* scratch,
                                            Summary<WARPS>& summary, QueryMemory& query) {
  // Read through a shuffle, the lane and what follows from it stay in registers.
  const int lane = __shfl_sync(~0u, threadIdx.x, threadIdx.x) & 31, w = threadIdx.x >> 5;
  const int g = lane >> 2, j = lane & 3;
  QueryPart part;
  float best[QUADS], total[QUADS];
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) { best[quad] = FAR; total[quad] = 0.f; }
  // Several quads do not fit the registers together: they are read again for every page.
  if (QUADS == 1) part.load(p, query, 0, lane);
  const int order = mix(g);
  const u32 scales01 = 0x4040 | order | (1 ^ order) << 8, scales23 = scales01 ^ 0x0202;
  const u32 sign_at = sign_place(lane), scale_at = KEY_SCALES + g * 4, mean_at = MEAN + j * MEAN_WORDS * 4;
  const u32 natural = shared_address(&query.natural[g >> 1][g & 1][0]) + j * MEAN_WORDS * 4;
  const u32 constant_at = CONSTS + (lane == 5 ? 8 : 4);
  // Offsets of 32 bits, as registers are few.
  u32 chunk_at = w * CHUNK_BYTES + lane * 4;
  u32 crec = (block.row * p.pages + block.first + w) * (HEADS + 4) + (lane < 4 ? lane : HEADS + lane - 4);
  for (int n = 0; n < reader.mine; n++) {
    const u32 record = reader.ring.wait(n);
    // Not earlier: with more under way than memory can answer, some multiprocessors wait for all others.
    reader.fetch(n + 1);
    const u32 name = load_shared(record + SLOT - 16);
    const int here = name & 0xffffff, tokens = name >> 24;
    u32 constants[2], mean[MEAN_WORDS];
    load_shared2(constants, record + CONSTS);
    const float mean_step = __uint_as_float(constants[0]), key_base = __uint_as_float(constants[1]);
    const float own_constant = __uint_as_float(load_shared(record + constant_at));   // lane 4: key base, lane 5: value base
    load_mean_words(mean, record + mean_at);
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) {
      if (QUADS > 1) part.load(p, query, quad, lane);
      // q.mean: all rows of a product are the same, so that every lane finds head j in its columns.
      // Rows 0 .. 7 take words 0 and 2 of four, rows 8 .. 15 words 1 and 3: no copies of registers.
      int f[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
      u32 q[MEAN_WORDS];
      load_mean_words(q, natural + quad * 4 * 2 * (D + 16));
#pragma unroll
      for (int i = 0; i + 4 <= MEAN_WORDS; i += 4) {
        mma_signed(f[0], mean[i], mean[i + 1], mean[i + 2], mean[i + 3], q[i], q[i + 2]);
        mma_signed(f[1], mean[i], mean[i + 1], mean[i + 2], mean[i + 3], q[i + 1], q[i + 3]);
      }
      if (MEAN_WORDS % 4) mma_signed(f[0], mean[MEAN_WORDS - 2], 0, mean[MEAN_WORDS - 1], 0, q[MEAN_WORDS - 2], q[MEAN_WORDS - 1]);
      const float offset = (float)((f[0][0] + f[1][2]) * 128 + f[0][1] + f[1][3]) * (mean_step * part.gain);
      // With s what the products count: sum_c (+-1) q = 2 s - sum_c sum_i 3^i |digit i|, of which half is
      // in the start of s. The clamp keeps logits, which are halves, below 30000. Without its last two
      // bits the slope takes the bias away exactly.
      const float unit = fminf(part.gain * (QUERY_RANGE / COARSE * SIGN_GAIN) * key_base, 12000.f / (COARSE * D));
      const float slope = __uint_as_float(__float_as_uint(2.f * unit) & ~3u), shift = -12582912.f * slope;
      u32 logit[8], top = FAR_HALF;
#pragma unroll
      for (int round = 0; round < 4; round++) {
        int upper[2][4], lower[2][4];
        const int zero[4] = {0, 0, 0, 0};
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
          for (int t = 0; t < 2; t++) {
            u32 a[2];
            load_signs(a, record + sign_at, order, round, step, t);
            binary_mma(upper[t], a[0], a[1], part.plane[step][0][0], part.plane[step][0][1], step ? upper[t] : zero);
            binary_mma(lower[t], a[0], a[1], part.plane[step][1][0], part.plane[step][1][1], step ? lower[t] : part.start);
          }
        const u32 scales = load_shared(record + scale_at + round * 32);
#pragma unroll
        for (int t = 0; t < 2; t++) {
          const auto sum = [&](int i) { return __int_as_float((upper[t][i] * 3 + lower[t][i]) * 9 + upper[t][i + 1] * 3 + lower[t][i + 1]); };
          const float x = fmaf(sum(0), slope, shift), y = fmaf(sum(2), slope, shift);
          logit[2 * round + t] = multiply2(halves(x, y), prmt(scales, 0, t ? scales23 : scales01) << 6);   // E4M4
        }
      }
      if (tokens < PAGE) {
        query.ragged = true;
        int left = tokens - 4 * g, place = order;
        // Rare: nothing of it may be computed before the loop and kept in registers.
        asm volatile("" : "+r"(left), "+r"(place));
#pragma unroll
        for (int i = 0; i < 16; i++)
          if ((i >> 2) * 32 + ((i & 3) ^ place) >= left) logit[i / 2] = prmt(logit[i / 2], FAR_HALF, i & 1 ? 0x5410 : 0x3254);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) top = max2(top, logit[i]);
#pragma unroll
      for (int m = 4; m < 32; m <<= 1) top = max2(top, __shfl_xor_sync(~0u, top, m));
      top = max2(top, prmt(top, top, 0x1032));
      const u32 lift_half = float_to_half(TOP - half_to_float(top & 0xffff)), lift = lift_half | lift_half << 16;
      u32 e[8], sums = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) { e[i] = ex2_2(add2(logit[i], lift)); sums = add2(sums, e[i]); }
#pragma unroll
      for (int round = 0; round < 4; round++) {
        // Bits 7..14 of the halves: dropping the sign leaves 5 exponent and 3 mantissa bits a code.
        const u32 others = __funnelshift_l(e[2 * round + 1], e[2 * round + 1], 5);
        const u32 codes = (e[2 * round] >> 3 & CODE_PAIR) | (others & ~CODE_PAIR);
        const u32 to = chunk_at + quad * 512 + round * 128;
        if (n * WARPS + w < p.resident) store_shared(resident + to, codes);
        else store_kept(scratch + to, codes);
      }
      const float page_top = TOP - half_to_float(lift_half) + offset;
      // A page without tokens is so far below any other that it does not count.
      const float both = fmaxf(best[quad], page_top), sum = half_to_float(sums & 0xffff) + half_to_float(sums >> 16);
      total[quad] = fmaf(sum, ex2(page_top - both), total[quad] * ex2(best[quad] - both));
      best[quad] = both;
      if (lane < 4) {
        const u32 to = chunk_at + CHUNK_MAXIMA + quad * 16;
        if (n * WARPS + w < p.resident) store_shared(resident + to, __float_as_uint(page_top));
        else *(float*)(scratch + to) = page_top;
      }
      // The attention wants the logit itself, not the flatter vote.
      const float own = lane < 4 ? offset * (1.f / SELECT_SHARPNESS) : lane == 6 ? __int_as_float(here) : own_constant;
      if (lane < (quad ? 4 : 7)) p.offsets[crec + quad * 4] = own;
    }
    __syncwarp();
    chunk_at += WARPS * CHUNK_BYTES;
    crec += WARPS * (HEADS + 4);
  }
  reader.ring.close(lane);
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) {
#pragma unroll
    for (int m = 4; m < 32; m <<= 1) total[quad] += __shfl_xor_sync(~0u, total[quad], m);
    if (lane < 4) summary.totals[w][quad * 4 + lane] = make_float2(best[quad], total[quad]);
  }
}

// Keys of a block's tokens, from the mass that all heads' attention has on them, and their histogram.
template <int WARPS>
__device__ __forceinline__ void make_keys(const Params& p, const Block& block, SelectMemory<WARPS>& m, const KeyPlaces& keys, const u8* resident,
                                          const u8* scratch, Summary<WARPS>& summary, bool ragged) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  const int* counts = p.counts + (i64)(block.row / p.heads) * p.pages + block.first;
  for (int head = w; head < HEADS; head += WARPS) {   // lane = warp
    const float2 own = lane < WARPS ? summary.totals[lane][head] : make_float2(FAR, 0.f);
    const float best = warp_max(own.x), total = warp_sum(own.y * ex2(own.x - best));
    if (lane == 0) summary.block_totals[head] = make_float2(best, total);
  }
  cluster_sync();
  for (int head = w; head < HEADS; head += WARPS) {   // lane = block of the cluster
    const uint2 part = lane < block.size ? load_remote2(&summary.block_totals[head], lane) : make_uint2(__float_as_uint(FAR), 0);
    const float own = __uint_as_float(part.x), best = warp_max(own), total = warp_sum(__uint_as_float(part.y) * ex2(own - best));
    // Codes and totals both carry 2^TOP; read as bfloat16, a code's exponent is 112 too small.
    if (lane == 0) summary.shift[head] = head < G ? 112.f - best - lg2(fmaxf(total, 1e-30f)) : -1000.f;
  }
  __syncthreads();
  // A lane's tokens are 4 lane + (i ^ order): the permutes put their keys in order.
  const int order = mix(lane & 7);
  const u32 keys01 = order == 0 ? 0x3210 : order == 1 ? 0x1032 : order == 2 ? 0x7654 : 0x5476, keys23 = keys01 ^ 0x4444;
  // Several pages are loaded before the first is needed.
  constexpr int BATCH = QUADS == 1 ? 4 : 1;
  for (int start = w; start < block.pages; start += WARPS * BATCH) {
    uint4 codes[BATCH][QUADS];
    float4 maxima[BATCH][QUADS];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int page = start + i * WARPS < block.pages ? start + i * WARPS : start;
      const u8* chunk = (page < p.resident ? resident : scratch) + (i64)page * CHUNK_BYTES;
#pragma unroll
      for (int quad = 0; quad < QUADS; quad++) {
        codes[i][quad] = *(const uint4*)(chunk + quad * 512 + lane * 16);
        maxima[i][quad] = *(const float4*)(chunk + CHUNK_MAXIMA + quad * 16);
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int page = start + i * WARPS;
      if (page >= block.pages) break;
      u32 mass[2] = {0x22802280, 0x22802280};   // 2^-58: the smallest key is 1
#pragma unroll
      for (int quad = 0; quad < QUADS; quad++) {
        const uint4 v = codes[i][quad];
        const float4 top = maxima[i][quad];
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        const float tops[4] = {top.x, top.y, top.z, top.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (quad * 4 + j >= G) break;
          const u32 factor = bfloat_pair(ex2(tops[j] + summary.shift[quad * 4 + j]));
          mass[0] = multiply_add_bfloat2(words[j] & CODE_PAIR, factor, mass[0]);
          mass[1] = multiply_add_bfloat2(__funnelshift_r(words[j], words[j], 8) & CODE_PAIR, factor, mass[1]);
        }
      }
      __syncwarp();   // keys overwrite the codes of their own page
      // 6 exponent and 5 mantissa bits of the mass, 2^-58 .. 2^6.
      const u32 a = (mass[0] >> 2 & 0x3fff3fff) - 2207 * 0x10001, b = (mass[1] >> 2 & 0x3fff3fff) - 2207 * 0x10001;
      uint2 pair = make_uint2(prmt(a, b, keys01), prmt(a, b, keys23));
      put_keys(m, keys.at(page), pair, ragged ? counts[page] : PAGE, lane);
    }
  }
}

// Keys of a block's tokens and their histogram, where the ring was; ends with a barrier.
template <int WARPS>
__device__ __forceinline__ void score_row(const Params& p, const Block& block, SelectMemory<WARPS>& m, PageReader<WARPS>& reader, QueryMemory& query,
                                          const KeyPlaces& keys, const u8* resident, u8* scratch) {
  __shared__ Summary<WARPS> summary;
  score_pages<WARPS>(p, block, reader, shared_address(resident), scratch, summary, query);
  __syncthreads();
  clear_histogram(m);
  make_keys<WARPS>(p, block, m, keys, resident, scratch, summary, query.ragged);
  __syncthreads();
  if (threadIdx.x == 0) m.histogram[0] = 0;   // what does not exist
}
