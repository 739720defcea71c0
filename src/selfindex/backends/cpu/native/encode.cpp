// Raw pages to their planes.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "arena.h"
#include "operators.h"
#include "parallel.h"

namespace selfindex {
namespace {

// Keys and values of one KV head of a page, with bytes from one token to the next.
struct Raw {
  const uint8_t *keys, *values;
  int64_t key_stride, value_stride;
};

int live_tokens(const Pages& pages, int64_t page) {
  return std::min(std::max(pages.counts[page], 0), pages.layout.page);
}

void check_blocks(const Pages& pages) {
  for (int64_t page = 0; page < pages.count; page++)
    if (pages.blocks[page] >= pages.room)
      throw std::out_of_range("a page is to be written to a block outside the pool");
}

// What is in a plane besides the records.
void begin_page(const Pages& pages, int64_t page, uint8_t* index, uint8_t* payload) {
  const Layout& layout = pages.layout;
  const int64_t records = layout.heads * layout.index_record, all = layout.heads * layout.payload_record;
  std::memset(index + records, 0, pages.index_bytes - records);
  std::memcpy(index + records, pages.counts + page, sizeof(int32_t));
  std::memset(payload + all, 0, pages.payload_bytes - all);
}

// `bytes` of memory a thread for `raw`, which says where the tokens of (page, head, memory) are.
template <class Find>
void encode_pages(const Kernels& kernels, const Pages& pages, int64_t bytes, const Find& raw) {
  // Often there is nothing to do, in a step that runs for every token.
  if (std::all_of(pages.blocks, pages.blocks + pages.count, [](int32_t block) { return block < 0; })) return;
  const Layout& layout = pages.layout;
  const int64_t dim = layout.dim, heads = layout.heads;
  const int threads = std::max(1, pages.threads);
  // Whole vectors of tokens for any instruction set.
  const int64_t tokens = (layout.page + 15) / 16 * 16;
  Arena arena;
  std::vector<float*> scratch(threads), scales(threads);
  std::vector<uint8_t*> memory(threads);
  arena.lay_out([&] {
    for (int i = 0; i < threads; i++) {
      scratch[i] = arena.take<float>(tokens * dim);
      scales[i] = arena.take<float>(tokens);
      memory[i] = arena.take<uint8_t>(bytes);
    }
  });
  parallel_for(threads, pages.count * heads, [&](int64_t i, int worker) {
    const int64_t page = i / heads, head = i % heads, block = pages.blocks[page];
    if (block < 0) return;
    uint8_t* index = pages.index + block * pages.index_stride;
    uint8_t* payload = pages.payload + block * pages.payload_stride;
    if (head == 0) begin_page(pages, page, index, payload);
    index += head * layout.index_record;
    payload += head * layout.payload_record;
    std::memset(index, 0, layout.index_record);
    std::memset(payload, 0, layout.payload_record);
    const Raw from = raw(page, head, memory[worker]);
    const auto encode = layout.preset == kPaper ? kernels.encode_paper : kernels.encode;
    encode({&layout, pages.format, from.keys, from.values, from.key_stride, from.value_stride,
            live_tokens(pages, page), pages.constants + page * pages.constants_stride + head * layout.constants(),
            pages.value_factor, pages.order, pages.block, index, payload, scratch[worker], scales[worker]});
  });
}

}  // namespace

void encode(const Kernels& kernels, const Pages& pages, const Strided& keys, const Strided& values) {
  check_blocks(pages);
  encode_pages(kernels, pages, 0, [&](int64_t page, int64_t head, uint8_t*) -> Raw {
    return {keys.at + page * keys.outer + head * keys.head, values.at + page * values.outer + head * values.head,
            keys.token, values.token};
  });
}

void encode_paged(const Kernels& kernels, const Pages& pages, const PagedTokens& tokens,
                  const int32_t* first) {
  check_blocks(pages);
  for (int64_t row = 0; row < pages.count; row++)
    for (int t = 0; pages.blocks[row] >= 0 && t < live_tokens(pages, row); t++)
      tokens.block_of(row, int64_t{first[row]} + t);
  // Copied together, since what encodes wants tokens at equal distances; keys beside values.
  const int64_t token = tokens.token;
  encode_pages(kernels, pages, pages.layout.page * token,
               [&](int64_t row, int64_t head, uint8_t* memory) -> Raw {
                 for (int t = 0; t < live_tokens(pages, row); t++)
                   std::memcpy(memory + t * token,
                               tokens.at + head * tokens.head + tokens.offset(row, int64_t{first[row]} + t), token);
                 return {memory, memory + token / 2, token, token};
               });
}

}  // namespace selfindex
