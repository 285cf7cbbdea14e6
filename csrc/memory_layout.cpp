#include "memory_layout.hpp"

#include <malloc.h>
#include <unistd.h>

#include <cstddef>

namespace rlef {
namespace {

constexpr std::size_t kLargestPiece = 64 << 10;  // far from what the heap takes a mapping of its own for
constexpr std::size_t kSmallBin = 1024;          // up to here the heap has a free list for each size
constexpr std::size_t kHeapStep = 16;

}  // namespace

void fill_gaps_of_heap() {
    static void* taken = nullptr;  // a chain, so that nothing is lost
    ::malloc_trim(0);
    const auto* const end = static_cast<const char*>(::sbrk(0));
    const auto smaller = [](std::size_t size) { return size > kSmallBin ? size / 2 : size - kHeapStep; };
    for (std::size_t size = kLargestPiece; size >= kHeapStep; size = smaller(size)) {
        while (void* const piece = ::malloc(size)) {
            if (static_cast<const char*>(piece) >= end) {
                ::free(piece);
                break;
            }
            *static_cast<void**>(piece) = taken;
            taken = piece;
        }
    }
}
// NOLINTEND(cppcoreguidelines-no-malloc)

}  // namespace rlef
