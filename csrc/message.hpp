#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "isolation.hpp"
#include "limits.hpp"
#include "unique_fd.hpp"

namespace rlef {

/// From the supervisor to a worker. Expected outputs are not among it.
struct Request {
    enum class Kind : std::uint32_t {
        Program,  // limits; with one descriptor: the source, or the command. The text names the function to
                  // call, if any
        Test,     // with descriptors: standard input, output and error; for a command, a file for its
                  // outputs; for a checker, the expected output and the output
        End,      // no more tests of this program
    };
    Kind kind;
    std::uint32_t few_tests = 0;  // Program: so few that a process to compile it for all would not pay
    Limits limits;
};

/// From a worker to the supervisor.
struct Report {
    enum class Kind : std::uint32_t {
        Ready,          // isolated; `layers` holds what is missing
        Finished,       // one test process ended
        NotCompiled,    // the source is no program; the text is what the interpreter said
        Died,           // the solution process ended of itself
        CannotIsolate,  // the text names the step that failed
        CannotExecute,  // a command, and the text says why: neither it nor the machine is broken
    };
    enum class Stopped : std::uint32_t { No, CpuTime, WallTime };
    Kind kind;
    std::int32_t wait_status;
    Stopped stopped;
    std::uint32_t memory_error;  // an uncaught MemoryError; the one thing that a program may say of itself
    std::uint32_t compiled;      // Died: whether the source had been compiled
    std::uint32_t syntax_error;  // NotCompiled: by the fault of its syntax
    std::int64_t cpu_ns;
    std::int64_t wall_ns;
    std::int64_t peak_memory_bytes;
    std::int64_t bare_memory_bytes;  // Ready: what a worker holds before it has seen a program
    LayerErrors layers;
};

template <typename Header>
struct Message {
    Header header;
    std::string text;
    std::vector<UniqueFd> fds;
};

/// Sends one message. False when the other side is gone.
/// Throws std::system_error for any other failure.
bool send_message(int socket, const Request& header, std::string_view text, const std::vector<int>& fds);
bool send_message(int socket, const Report& header, std::string_view text, const std::vector<int>& fds);

/// Receives one message, waiting for it unless `flags` holds MSG_DONTWAIT. Empty when the other side is gone.
/// Throws std::system_error (EAGAIN when nothing is there and MSG_DONTWAIT was given).
std::optional<Message<Request>> receive_request(int socket);
std::optional<Message<Report>> receive_report(int socket, int flags);

}  // namespace rlef
