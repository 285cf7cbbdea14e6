#pragma once

#include <errno.h>

#include <system_error>

namespace rlef {

/// Throws what errno says, as std::system_error.
[[noreturn]] inline void fail(const char* step) {
    throw std::system_error(errno, std::generic_category(), step);
}

inline void must(bool succeeded, const char* step) {
    if (!succeeded) fail(step);
}

}  // namespace rlef
