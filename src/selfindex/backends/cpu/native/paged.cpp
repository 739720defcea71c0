// Full-precision tokens in the blocks of an engine.
#include <stdexcept>

#include "operators.h"

namespace selfindex {

int64_t PagedTokens::block_of(int64_t row, int64_t position) const {
  if (position < 0 || position >= columns * size)
    throw std::out_of_range("a token's position is outside the window's table");
  const int64_t found = table[row * columns + position / size];
  if (found < 0 || found >= blocks) throw std::out_of_range("the window's table names a block outside the window");
  return found;
}

}  // namespace selfindex
