// Table sums with a byte shuffle: 16 tokens per 128-bit lane look their codes up in one instruction.
// Included inside a namespace, after a struct `Vec` with the vector operations.

constexpr int kBlock = 16 * Vec::kLanes128;

// One step of the transposition: afterwards the 7-bit address (register, byte) of every byte of a
// lane is the one before, rotated left by one bit.
inline void interleave(Vec::Reg (&x)[8]) {
  Vec::Reg y[8];
  for (int i = 0; i < 4; i++) {
    y[2 * i] = Vec::unpack_low8(x[i], x[i + 4]);
    y[2 * i + 1] = Vec::unpack_high8(x[i], x[i + 4]);
  }
  for (int i = 0; i < 8; i++) x[i] = y[i];
}

// Bytes [kBlock tokens][bytes] -> turned [bytes][kBlock].
inline void transpose(const uint8_t* codes, int bytes, uint8_t* turned) {
  for (int start = 0; start < bytes; start += 8) {
    // The last 8 bytes may overlap the ones before: the same values are written again.
    const int at = start + 8 <= bytes ? start : bytes - 8;
    Vec::Reg x[8];
    // Address bits are token (4 bits), byte (3 bits): rotated by 4 they are byte, token.
    for (int i = 0; i < 8; i++) x[i] = Vec::load_pairs(codes + 2 * i * bytes + at, bytes);
    for (int step = 0; step < 4; step++) interleave(x);
    for (int i = 0; i < 8; i++) Vec::store(turned + (at + i) * kBlock, x[i]);
  }
}

template <int kRows>
inline void lookup_rows(const uint8_t* turned, int bytes, const uint8_t* tables, int16_t* sums,
                        int64_t stride) {
  const int64_t table = (int64_t)bytes * 2 * kGroupEntries;
  // 16-bit sums of all bytes (even tokens, with the odd ones 256-fold above) and of odd tokens.
  Vec::Reg all[kRows], odd[kRows];
  for (int r = 0; r < kRows; r++) all[r] = odd[r] = Vec::zero();
  for (int j = 0; j < bytes; j++) {
    const Vec::Reg code = Vec::load(turned + j * kBlock);
    const Vec::Reg low = Vec::low_nibbles(code), high = Vec::high_nibbles(code);
    for (int r = 0; r < kRows; r++) {
      const uint8_t* entry = tables + r * table + 2 * j * kGroupEntries;
      // At most 127 each.
      const Vec::Reg both = Vec::add8(Vec::shuffle(Vec::spread128(entry), low),
                                      Vec::shuffle(Vec::spread128(entry + kGroupEntries), high));
      all[r] = Vec::add16(all[r], both);
      odd[r] = Vec::add16(odd[r], Vec::shift_right16(both));
    }
  }
  for (int r = 0; r < kRows; r++) {
    const Vec::Reg even = Vec::sub16(all[r], Vec::shift_left16(odd[r]));
    Vec::store_lanes(sums + r * stride, Vec::unpack_low16(even, odd[r]),
                     Vec::unpack_high16(even, odd[r]));
  }
}

void lookup(const uint8_t* codes, int tokens, int bytes, const uint8_t* tables, int rows,
            int16_t* sums, int64_t stride) {
  alignas(64) uint8_t turned[kMaxDim / 8 * kBlock];
  alignas(64) uint8_t part[kMaxDim / 8 * kBlock];
  alignas(64) int16_t part_sums[4 * kBlock];
  const int64_t table = (int64_t)bytes * 2 * kGroupEntries;
  for (int start = 0; start < tokens; start += kBlock) {
    const int n = tokens - start < kBlock ? tokens - start : kBlock;
    const uint8_t* block = codes + (int64_t)start * bytes;
    if (n < kBlock) {
      __builtin_memset(part, 0, sizeof part);
      __builtin_memcpy(part, block, (int64_t)n * bytes);
      block = part;
    }
    transpose(block, bytes, turned);
    for (int r = 0; r < rows;) {
      const int left = rows - r, step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      int16_t* to = n < kBlock ? part_sums : sums + r * stride + start;
      const int64_t to_stride = n < kBlock ? kBlock : stride;
      const uint8_t* from = tables + r * table;
      if (step == 4) lookup_rows<4>(turned, bytes, from, to, to_stride);
      else if (step == 2) lookup_rows<2>(turned, bytes, from, to, to_stride);
      else lookup_rows<1>(turned, bytes, from, to, to_stride);
      if (n < kBlock)
        for (int i = 0; i < step; i++)
          __builtin_memcpy(sums + (r + i) * stride + start, part_sums + i * kBlock, 2 * (int64_t)n);
      r += step;
    }
  }
}
