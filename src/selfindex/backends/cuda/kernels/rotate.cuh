// Randomised Hadamard rotation of one vector a warp (codec/rotation.py), of floats or whole numbers, unnormalised:
//   rotate:  y = H x      rotate_back:  y = H^T x
// H = Sylvester for powers of two, Sylvester(8) x Paley(12) for 96. Signs come from SplitMix64.
#if PAPER   // channels stay as they are
__device__ __forceinline__ float sign_of(int, u64) { return 1.f; }
template <bool BACK, class T> __device__ __forceinline__ void rotate_any(T*, int, T*) {}
constexpr int LINE = 1;
#else
__device__ __forceinline__ float sign_of(int channel, u64 seed) {
  u64 z = seed + (u64)(channel + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return (z ^ (z >> 31)) >> 63 ? -1.f : 1.f;
}

#if D == 96
// Bit j of row i set: entry (i, j) of the Paley matrix of order 12 is -1.
__device__ const u16 PALEY[12] = {PALEY_ROWS};

// -x if `negative` is 1, x if it is 0.
__device__ __forceinline__ float negated(float x, u32 negative) { return __uint_as_float(__float_as_uint(x) ^ negative << 31); }
__device__ __forceinline__ int negated(int x, u32 negative) { return negative ? -x : x; }

template <bool BACK, class T> __device__ __forceinline__ void rotate_any(T* x, int lane, T* line) {
  // line: 2 x 96 numbers of this warp's own shared memory
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 3; r++) line[r * 32 + lane] = x[r];
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 3; r++) {
    const int c = r * 32 + lane, hi = c / 12, lo = c - hi * 12;
    T sum = 0;
#pragma unroll
    for (int j = 0; j < 12; j++) {
      const u32 negative = BACK ? PALEY[j] >> lo & 1 : PALEY[lo] >> j & 1;
      sum += negated(line[hi * 12 + j], negative);
    }
    line[96 + c] = sum;
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 3; r++) {
    const int c = r * 32 + lane, hi = c / 12, lo = c - hi * 12;
    T sum = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += negated(line[96 + j * 12 + lo], __popc(hi & j) & 1);
    x[r] = sum;
  }
}
constexpr int LINE = 192;
#else
template <bool BACK, class T> __device__ __forceinline__ void rotate_any(T* x, int lane, T*) {
#pragma unroll
  for (int m = 1; m < 32; m <<= 1)
#pragma unroll
    for (int r = 0; r < R; r++) {
      const T other = __shfl_xor_sync(~0u, x[r], m);
      x[r] = lane & m ? other - x[r] : x[r] + other;
    }
#pragma unroll
  for (int m = 1; m < R; m <<= 1)
#pragma unroll
    for (int r = 0; r < R; r++)
      if (!(r & m)) {
        const T a = x[r], b = x[r | m];
        x[r] = a + b;
        x[r | m] = a - b;
      }
}
constexpr int LINE = 1;
#endif
#endif
template <class T> __device__ __forceinline__ void rotate(T* x, int lane, T* line) { rotate_any<false>(x, lane, line); }
template <class T> __device__ __forceinline__ void rotate_back(T* x, int lane, T* line) { rotate_any<true>(x, lane, line); }
__device__ __forceinline__ float rotation_gain() { return PAPER ? 1.f : rsqrtf((float)D); }
