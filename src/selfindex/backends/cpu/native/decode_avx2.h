// Levels from packed codes, and sums over the lanes of integer dot products, in AVX2.
// Included inside a namespace.

inline __m256i pattern(long long low) { return _mm256_set1_epi64x(low); }

void expand(const uint8_t* const* crumbs, const uint8_t* const* signs, int n, int width,
            const int8_t* magnitudes, int8_t* levels) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)magnitudes));
  // Every byte of 2-bit codes four times, every byte of signs eight times.
  const __m256i four = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4,
                                        5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
  const __m256i eight = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2,
                                         2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  // Even channels keep their code in bits 0 and 1, odd ones in bits 2 and 3.
  const __m256i keep = _mm256_set1_epi16(0x0C03);
  const __m256i bit = pattern((long long)0x8040201008040201ull);
  for (int t = 0; t < n; t++) {
    for (int i = 0; i < width; i += 32) {
      long long packed;
      __builtin_memcpy(&packed, crumbs[t] + i / 4, 8);
      const __m256i low = _mm256_shuffle_epi8(_mm256_set1_epi64x(packed), four);
      const __m256i high = _mm256_srli_epi16(low, 4);
      const __m256i code = _mm256_and_si256(_mm256_blend_epi16(low, high, 0xAA), keep);
      __m256i level = _mm256_shuffle_epi8(table, code);
      if (signs) {
        int word;
        __builtin_memcpy(&word, signs[t] + i / 8, 4);
        const __m256i sign = _mm256_shuffle_epi8(_mm256_set1_epi32(word), eight);
        const __m256i negative =
            _mm256_cmpeq_epi8(_mm256_and_si256(sign, bit), _mm256_setzero_si256());
        level = _mm256_sub_epi8(_mm256_xor_si256(level, negative), negative);
      }
      _mm256_storeu_si256((__m256i*)(levels + t * width + i), level);
    }
  }
}

// Sums of the 8 lanes of four vectors.
inline __m128i lane_sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
}
