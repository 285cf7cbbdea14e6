#pragma once

#include <sys/types.h>

#include <functional>
#include <string>

#include "isolation.hpp"

namespace rlef {

/// How a test process ended its program.
struct Ending {
    int exit_code;
    bool memory_error;  // an uncaught MemoryError
};

/// Why a source did not become a program.
struct CompileError {
    std::string text;  // what the interpreter says
    bool syntax;       // the fault of its syntax
    bool memory;       // the compiler ran out of memory
};

/// The interpreter that a worker holds warm. The worker itself knows nothing of it.
struct Interpreter {
    std::function<void()> before_fork;
    std::function<void()> after_fork_in_parent;
    std::function<void()> after_fork_in_child;
    /// Keeps the compiled program. Throws CompileError.
    std::function<void(std::string_view source)> compile;
    /// Runs the program that was compiled, flushes, and says how it ended. With the name of a function, the
    /// program is that function, called with the arguments that standard input holds.
    std::function<Ending(std::string_view function)> run;
};

/// The life of a worker: isolates itself, then runs programs until the supervisor's end of `socket` closes.
/// Returns only on that; forked children leave by _exit. Throws std::system_error when its own means fail.
void serve(int socket, pid_t supervisor, const FileView& view, const Interpreter& interpreter);

}  // namespace rlef
