// Reading a token's codes.
__device__ __forceinline__ float half_at(const u8* p) { return half_to_float(*(const u16*)p); }

// Sign and magnitude of 16 channels as places in a table of 8, one a nibble: at[0] of channels
// 0, 2, .. 14 and at[1] of 1, 3, .. 15. `upper`: which half of `signs` holds theirs.
__device__ __forceinline__ void places(u32* at, u32 magnitudes, u32 signs, bool upper) {
  u32 s = prmt(signs, 0, upper ? 0x4342 : 0x4140);
  s = (s | s << 4) & 0x0f0f0f0f;
  s = (s | s << 2) & 0x33333333;
  at[0] = (magnitudes & 0x33333333) | (s << 2 & 0x44444444);
  at[1] = (magnitudes >> 2 & 0x33333333) | (s << 1 & 0x44444444); }
