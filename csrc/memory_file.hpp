#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "unique_fd.hpp"

// Files without a name, between the supervisor and the programs. All functions throw std::system_error.
namespace rlef {

/// Its offset stays at the beginning, where the program will read or write. The name is for /proc alone.
UniqueFd memory_file(const char* name);
/// A file that nobody can change any more.
UniqueFd sealed_file(const char* name, std::string_view text);

std::size_t size_of(const UniqueFd& file);
std::string read_range(const UniqueFd& file, std::size_t begin, std::size_t end);

}  // namespace rlef
