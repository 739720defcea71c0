// Estimated attention of every token of a block's pages, from the index alone, a warp a page:
//   logit[head, t] = scale_t a sum_c (+-1)_tc q~_c + q~.mean,      a = SIGN_GAIN
// The sum over channels is a binary matrix product (and + population count) of the sign codes with
// the bit planes of the 6-bit query, two columns a head, three products a column. Probabilities
// are kept as 8-bit floats (5 exponent, 3 mantissa bits) relative to their page's maximum.
//
// Codes of a page (chunk): [QUADS][4 rounds][32 lanes] words, lane = g * 4 + head of the quad, byte i
// = token 32 round + 8 i + g; then the page maximum of each head, float32, log2 units.
constexpr int CHUNK_BYTES = 528 * QUADS;
constexpr int CHUNK_MAXIMA = 512 * QUADS;
constexpr int STEPS = (D + 127) / 128;     // binary products of 128 channels
static_assert(PLANES == 6, "three planes a column");
constexpr int LOW = PLANES / 2;            // planes a column: 2 head = upper half, 2 head + 1 = lower
constexpr int MEAN_WORDS = (D / 4 + 31) / 32;
constexpr float TOP = 15.f;                // log2 of a page's largest code

__device__ __forceinline__ void binary_mma(int* c, u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b)); }

// Sign words of the four tokens 32 round + 8 i + g, channels 128 step + 32 j ...
__device__ __forceinline__ void load_signs(u32* a, const u8* record, int round, int step, int lane) {
#if D == 128
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(shared_address(record + round * 512 + lane * 16)));
#else
  const int g = lane >> 2, j = lane & 3;   // words past the head meet zero planes
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = *(const u32*)(record + (round * 32 + i * 8 + g) * CODE + step * 16 + j * 4);
#endif
}

// What a lane needs of the query, for one quad of heads.
struct QueryPart {
  u32 plane[STEPS][LOW];
  float sum, gain;
};

template <int WARPS>
__device__ __forceinline__ void score_pages(const Params& p, int row, int first, int last, u8* ring_memory,
                                            u8* chunks, float2 (*totals)[HEADS], u64* barriers, u32* query) {
  const int b = row / p.heads, h = row % p.heads, lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  const int g = lane >> 2, j = lane & 3;
  const int* table = p.table + (i64)b * p.pages;
  const int* counts = p.counts + (i64)b * p.pages;
  const u8* index = p.index + (i64)h * INDEX_RECORD;
  const auto record_of = [&](int page, int block) { return page < last ? index + (i64)block * p.index_stride : nullptr; };
  const int edge = max(last - 1, 0);
  Ring ring;
  ring.open(ring_memory + w * STAGES * SLOT, barriers + w * STAGES, lane);
  // Blocks of this page and of the next STAGES: their loads are ahead of the copies that need them.
  int blocks[STAGES + 1], count = counts[min(first + w, edge)];
#pragma unroll
  for (int s = 0; s <= STAGES; s++) blocks[s] = table[min(first + w + s * WARPS, edge)];
#pragma unroll
  for (int s = 0; s < STAGES; s++) ring.fetch(s, record_of(first + w + s * WARPS, blocks[s]), lane);
  // Query words for q.mean: [quad][word][lane][head of the quad, hi and lo; rows padded to 12].
  for (int i = threadIdx.x; i < QUADS * MEAN_WORDS * 32 * 8; i += WARPS * 32) {
    const int part = i & 7, l = i >> 3 & 31, word = (i >> 8) % MEAN_WORDS * 32 + l, quad = (i >> 8) / MEAN_WORDS;
    const int head = quad * 4 + (part >> 1);
    u32 v = 0;
    if (head < G && word < D / 4) v = ((const u32*)(p.qnat + ((i64)row * G + head) * 2 * D + (part & 1) * D))[word];
    query[((i >> 8) * 32 + l) * 12 + part] = v;
  }
  QueryPart part[QUADS];
  float best[QUADS], total[QUADS];
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) {
    const int column = quad * 4 + (g >> 1);
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
      for (int m = 0; m < LOW; m++) {
        const int plane = g & 1 ? LOW - 1 - m : PLANES - 1 - m, word = s * 4 + j;
        part[quad].plane[s][m] = column < G && word < R ? p.planes[(((i64)row * G + column) * PLANES + plane) * R + word] : 0;
      }
    const int head = quad * 4 + j;
    part[quad].gain = head < G ? p.qmeta[((i64)row * G + head) * 2] * p.scale * SELECT_SHARPNESS : 0.f;
    part[quad].sum = head < G ? p.qmeta[((i64)row * G + head) * 2 + 1] : 0.f;
    best[quad] = FAR;
    total[quad] = 0.f;
  }
  __syncthreads();
  for (int page = first + w; page < last; page += WARPS) {
    const int present = count, here = blocks[0], later = blocks[STAGES];
    count = counts[min(page + WARPS, edge)];
#pragma unroll
    for (int s = 0; s < STAGES; s++) blocks[s] = blocks[s + 1];
    blocks[STAGES] = table[min(page + (STAGES + 1) * WARPS, edge)];
    const u8* record = ring.wait();
    const float mean_step = *(const float*)(record + CONSTS), base = *(const float*)(record + CONSTS + 4);
    u8* chunk = chunks + (i64)(page - first) * CHUNK_BYTES;
    float* crec = p.crec + ((i64)row * p.pages + page) * (HEADS + 4);
    if (lane == 0)
      *(float4*)(crec + HEADS) = make_float4(base * LEVEL_UNIT, *(const float*)(record + CONSTS + 8), __int_as_float(here), 0.f);
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) {
      // q.mean of four heads; the transposing reduction leaves head j in lanes with lane % 4 == j.
      int d[4] = {0, 0, 0, 0};
#pragma unroll
      for (int word = 0; word < MEAN_WORDS; word++) {
        const int m = word * 32 + lane < D / 4 ? *(const int*)(record + MEAN + (word * 32 + lane) * 4) : 0;
        const int4* q = (const int4*)&query[((quad * MEAN_WORDS + word) * 32 + lane) * 12];
        const int4 q0 = q[0], q1 = q[1];
        d[0] += __dp4a(m, q0.y, __dp4a(m, q0.x, 0) * 128);
        d[1] += __dp4a(m, q0.w, __dp4a(m, q0.z, 0) * 128);
        d[2] += __dp4a(m, q1.y, __dp4a(m, q1.x, 0) * 128);
        d[3] += __dp4a(m, q1.w, __dp4a(m, q1.z, 0) * 128);
      }
      int e0 = lane & 1 ? d[0] : d[1], e1 = lane & 1 ? d[2] : d[3];
      e0 = __shfl_xor_sync(~0u, e0, 1) + (lane & 1 ? d[1] : d[0]);
      e1 = __shfl_xor_sync(~0u, e1, 1) + (lane & 1 ? d[3] : d[2]);
      int f = __shfl_xor_sync(~0u, lane & 2 ? e0 : e1, 2) + (lane & 2 ? e1 : e0);
      f += __shfl_xor_sync(~0u, f, 4);
      f += __shfl_xor_sync(~0u, f, 8);
      f += __shfl_xor_sync(~0u, f, 16);
      const float offset = (float)f * (mean_step * part[quad].gain);
      // sum_c (+-1) q = 2 s - sum q; the integer s is read as a float through its bias 1.5 * 2^23.
      const float unit = part[quad].gain * (float)(1 << (15 - PLANES)) * SIGN_GAIN * base;
      const float slope = 2.f * unit, shift = fmaf(-12582912.f, slope, -unit * part[quad].sum);
      float logit[16], top = FAR;
#pragma unroll
      for (int round = 0; round < 4; round++) {
        int n[2][LOW][4];
#pragma unroll
        for (int i = 0; i < 2 * LOW * 4; i++) (&n[0][0][0])[i] = 0;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          u32 a[4];
          load_signs(a, record, round, s, lane);
#pragma unroll
          for (int t = 0; t < 2; t++)
#pragma unroll
            for (int m = 0; m < LOW; m++) binary_mma(n[t][m], a[2 * t], a[2 * t + 1], part[quad].plane[s][m]);
        }
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            // Two's complement: the top plane of the upper half counts negative.
            const int upper = n[t][2][2 * i] + 2 * n[t][1][2 * i] - 4 * n[t][0][2 * i];
            const int lower = n[t][2][2 * i + 1] + 2 * n[t][1][2 * i + 1] + 4 * n[t][0][2 * i + 1];
            const int s = upper * 8 + lower + 0x4B400000;
            const int token = round * 32 + (2 * t + i) * 8 + g;
            logit[round * 4 + 2 * t + i] = scale_of(record[KEY_SCALES + token]) * fmaf(__int_as_float(s), slope, shift);
          }
      }
      if (present < PAGE) {
#pragma unroll
        for (int i = 0; i < 16; i++) if ((i >> 2) * 32 + (i & 3) * 8 + g >= present) logit[i] = FAR;
      }
#pragma unroll
      for (int i = 0; i < 16; i++) top = fmaxf(top, logit[i]);
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
      const float lift = TOP - top;
      float sum = 0.f;
#pragma unroll
      for (int round = 0; round < 4; round++) {
        float e[4];
#pragma unroll
        for (int i = 0; i < 4; i++) { e[i] = ex2(logit[round * 4 + i] + lift); sum += e[i]; }
        // Bits 7..14 of the halves: dropping the sign leaves 5 exponent and 3 mantissa bits a byte.
        ((u32*)chunk)[quad * 128 + round * 32 + lane] = prmt(halves(e[0], e[1]) << 1, halves(e[2], e[3]) << 1, 0x7531);
      }
      if (present > 0) {
        const float page_top = top + offset, both = fmaxf(best[quad], page_top);
        total[quad] = fmaf(sum, ex2(page_top - both), total[quad] * ex2(best[quad] - both));
        best[quad] = both;
      }
      if (lane < 4) {
        ((float*)(chunk + CHUNK_MAXIMA))[quad * 4 + lane] = top + offset;
        crec[quad * 4 + lane] = offset * (1.f / SELECT_SHARPNESS);   // the attention wants the logit itself
      }
    }
    __syncwarp();
    ring.fetch(ring.stage, record_of(page + STAGES * WARPS, later), lane);
    ring.next();
  }
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) {
#pragma unroll
    for (int m = 4; m < 32; m <<= 1) total[quad] += __shfl_xor_sync(~0u, total[quad], m);
    if (lane < 4) totals[w][quad * 4 + lane] = make_float2(best[quad], total[quad]);
  }
}
