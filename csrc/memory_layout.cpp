#include "memory_layout.hpp"

#include <fcntl.h>
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "unique_fd.hpp"

namespace rlef {
namespace {

constexpr int kCollapse = 25;                    // MADV_COLLAPSE, which older headers lack
constexpr std::size_t kLargestPiece = 64 << 10;  // far from what the heap takes a mapping of its own for
constexpr std::size_t kSmallBin = 1024;          // up to here the heap has a free list for each size
constexpr std::size_t kHeapStep = 16;

/// Neighbouring mappings of one file that cannot be written.
struct Range {
    std::uintptr_t begin;
    std::uintptr_t end;
    std::uintptr_t code_begin;
    std::uintptr_t code_end;  // 0: it holds no code
    std::string path;
};

std::vector<Range> readable_ranges() {
    std::vector<Range> ranges;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        std::istringstream fields(line);
        std::uintptr_t begin, end;
        char dash;
        std::string permissions, offset, device, inode, path;
        fields >> std::hex >> begin >> dash >> end >> permissions >> offset >> device >> inode >> path;
        const bool usable = permissions == "r--p" || permissions == "r-xp";
        if (!usable || path.empty() || path[0] != '/') continue;
        if (ranges.empty() || ranges.back().end != begin || ranges.back().path != path) {
            ranges.push_back({begin, end, UINTPTR_MAX, 0, path});
        }
        auto& range = ranges.back();
        range.end = end;
        if (permissions[2] == 'x') {
            range.code_begin = std::min(range.code_begin, begin);
            range.code_end = end;
        }
    }
    return ranges;
}

/// Of the pages that one entry of the upper table maps; 0 where there are none.
std::uintptr_t huge_page_size() {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
    std::uintptr_t size = 0;
    file >> size;
    return file ? size : 0;
}

std::uintptr_t rounded_up(std::uintptr_t address, std::uintptr_t size) {
    return (address + size - 1) / size * size;
}

char* pointer_to(std::uintptr_t address) {
    return reinterpret_cast<char*>(address);  // NOLINT(performance-no-int-to-ptr): it was read as a number
}

/// Leaves everything as it is where the kernel has no huge page to give: many small pages of our own would be
/// worse than those of the file.
void put_into_huge_page(std::uintptr_t place, std::uintptr_t size) {
    void* const room = ::mmap(nullptr, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) return;
    const auto begin = reinterpret_cast<std::uintptr_t>(room);
    const auto copy = rounded_up(begin, size);
    char* const bytes = pointer_to(copy);
    // Not by memcpy: constants have poisoned surroundings under a sanitizer.
    const UniqueFd memory(::open("/proc/self/mem", O_RDONLY | O_CLOEXEC));
    const bool copied =
        ::pread(memory.get(), bytes, size, static_cast<off_t>(place)) == static_cast<ssize_t>(size);
    // The kernel replaces the mapping in one step, and this very code may be within: nothing is done between.
    // Constants beside the code become executable, as a program can make any memory of its own anyway.
    if (copied && ::madvise(bytes, size, kCollapse) == 0 &&
        ::mprotect(bytes, size, PROT_READ | PROT_EXEC) == 0) {
        __builtin___clear_cache(bytes, bytes + size);
        ::mremap(bytes, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, pointer_to(place));
    }
    // The copy's own place, where it is still there, and what lies before and after it.
    ::munmap(room, 2 * size);
}

}  // namespace

void put_code_into_huge_pages() {
    const auto size = huge_page_size();
    if (size == 0) return;
    for (const auto& range : readable_ranges()) {
        for (auto page = rounded_up(range.begin, size); page + size <= range.end; page += size) {
            if (page < range.code_end && range.code_begin < page + size) put_into_huge_page(page, size);
        }
    }
}

// NOLINTBEGIN(cppcoreguidelines-no-malloc): the heap itself is what this is about
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
