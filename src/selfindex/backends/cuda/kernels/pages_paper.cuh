// The paper preset: key = +-largest (zero + scale code) + mean, value = zero + scale code.
struct Paper {
  struct Memory {
    float mean[D], largest[D];
  };
  static __device__ __forceinline__ void begin(const Place& place, const float* constants, Memory& m) {
    for (int c = threadIdx.x; c < D; c += PAGES_THREADS) {
      m.mean[c] = constants[c];
      m.largest[c] = constants[D + c];
    }
  }
  static __device__ __forceinline__ void decode(const PagesParams& p, const Place& place, const Memory& m) {
    const int lane = threadIdx.x & 31, slice = lane % LANES, own = (threadIdx.x >> 5) * OWN + lane / LANES;
    if (slice * 16 >= D) return;
    float mean[16], largest[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      mean[i] = m.mean[channel_of(slice, i)];
      largest[i] = m.largest[channel_of(slice, i)];
    }
#pragma unroll 2
    for (int round = 0; round < OWN / AT_ONCE; round++) {
      const int token = own + round * AT_ONCE;
      const u8 *codes = place.payload + token * TOKEN, *scales = place.payload + token * SCALES;
      const u32 magnitudes = read2(codes + 2 * slice), levels = read2(codes + D / 4 + 2 * slice), signs = read1(place.index + token * CODE + slice);
      if (!fits(p, place, token)) continue;
      const i64 to = place.first + token, key_to = place.head * p.key_head + to * p.key_token, value_to = place.head * p.value_head + to * p.value_token;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int first = channel_of(slice, 8 * half), group = first / 32 * 2;   // 8 channels are of one group
        const float key_scale = half_at(scales + KEY_SCALES + group), key_zero = half_at(scales + KEY_ZEROS + group);
        const float value_scale = half_at(scales + VALUE_SCALES + group), value_zero = half_at(scales + VALUE_ZEROS + group);
        float key[8], value[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int c = 8 * half + i;
          const float size = fmaf((float)(magnitudes >> 2 * c & 3), key_scale, key_zero) * largest[c];
          key[i] = (signs >> c & 1 ? size : -size) + mean[c];
          value[i] = fmaf((float)(levels >> 2 * c & 3), value_scale, value_zero);
        }
        store_channels(p.keys, key_to + first, key);
        store_channels(p.values, value_to + first, value);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(PAGES_THREADS, 2) restore_pages(const __grid_constant__ PagesParams p) { decode_page<Paper>(p); }
