// Levels from packed codes, and integer dot products with them, in AVX-512.
// Included inside a namespace, after decode_avx2.h, whose steps of 32 channels end widths that are no
// multiple of 64.

void expand_wide(const uint8_t* const* crumbs, const uint8_t* const* signs, int n, int width,
                 const int8_t* magnitudes, int8_t* levels) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)magnitudes));
  // Every byte of 2-bit codes four times; each lane has all 16 of them.
  const __m512i four = _mm512_add_epi8(
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)),
      _mm512_setr_epi64(0, 0, 0x0404040404040404, 0x0404040404040404, 0x0808080808080808, 0x0808080808080808,
                        0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C));
  // Even channels keep their code in bits 0 and 1, odd ones in bits 2 and 3.
  const __m512i keep = _mm512_set1_epi16(0x0C03);
  for (int t = 0; t < n; t++) {
    int i = 0;
    for (; i + 64 <= width; i += 64) {
      const __m512i low = _mm512_shuffle_epi8(
          _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(crumbs[t] + i / 4))), four);
      const __m512i code = _mm512_and_si512(
          _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_srli_epi16(low, 4)), keep);
      __m512i level = _mm512_shuffle_epi8(table, code);
      if (signs) {
        uint64_t positive;
        __builtin_memcpy(&positive, signs[t] + i / 8, 8);
        level = _mm512_mask_sub_epi8(level, ~positive, _mm512_setzero_si512(), level);
      }
      _mm512_storeu_si512(levels + t * width + i, level);
    }
    if (i < width) {
      const uint8_t *rest = crumbs[t] + i / 4, *sign = signs ? signs[t] + i / 8 : nullptr;
      expand(&rest, signs ? &sign : nullptr, 1, width - i, magnitudes, levels + t * width + i);
    }
  }
}

inline __m256i halves(__m512i x) {
  return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
}

void level_dots(const int8_t* levels, int n, int width, const int16_t* row, int rows, int32_t* dots) {
  for (int r = 0; r < rows; r += 4) {
    const int live = rows - r < 4 ? rows - r : 4;
    // Missing rows repeat the last one.
    const int16_t* at[4];
    for (int i = 0; i < 4; i++) at[i] = row + (int64_t)(r + (i < live ? i : live - 1)) * width;
    for (int t = 0; t < n; t++) {
      const int8_t* level = levels + t * width;
      __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                        _mm512_setzero_si512()};
      for (int i = 0; i < width; i += 32) {
        const __m512i x = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(level + i)));
        for (int k = 0; k < 4; k++)
          sum[k] = _mm512_add_epi32(sum[k], _mm512_madd_epi16(x, _mm512_loadu_si512(at[k] + i)));
      }
      alignas(16) int32_t four[4];
      _mm_store_si128((__m128i*)four, lane_sums(halves(sum[0]), halves(sum[1]), halves(sum[2]), halves(sum[3])));
      for (int k = 0; k < live; k++) dots[(r + k) * kTile + t] = four[k];
    }
  }
}
