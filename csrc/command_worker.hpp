#pragma once

#include <sys/types.h>

#include "isolation.hpp"

namespace rlef {

/// The life of a worker that runs commands: isolates itself, then executes commands on tests until the
/// supervisor's end of `socket` closes. Returns only on that; forked children leave by _exit or become the
/// command. Throws std::system_error when its own means fail.
void serve_commands(int socket, pid_t supervisor, const FileView& view);

}  // namespace rlef
