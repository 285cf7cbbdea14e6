#pragma once

#include <cstdint>

namespace rlef {

/// What one test may use. The units are those of the wire; the Python side validates the values.
struct Limits {
    std::int64_t cpu_ns;
    std::int64_t wall_ns;
    std::int64_t memory_bytes;
    std::int64_t processes;
    std::int64_t output_bytes;
    std::int64_t kept_output_bytes;
    std::int64_t open_files;
    std::int64_t file_bytes;  // what a command may write in its working folder
};

}  // namespace rlef
