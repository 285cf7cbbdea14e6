#pragma once

#include <sys/types.h>

#include "call_numbers.hpp"
#include "filter.hpp"

namespace rlef {

/// What a worker and everything below it may ask of the kernel. Installed once, inherited.
Policy worker_policy(Architecture architecture = kOwnArchitecture);

/// What a command may do besides computing.
struct CommandRights {
    bool fork;   // start processes
    bool write;  // change files, where the file system and Landlock let it
};

/// What a command and everything below it may ask. Installed before the command is executed, so it grants
/// that too.
Policy command_policy(CommandRights rights, Architecture architecture = kOwnArchitecture);

/// What one test may not ask although the policy before this grants it: no processes but threads (unless it
/// `may_fork`), no signals but to itself.
Policy test_policy(pid_t own_pid, Architecture architecture = kOwnArchitecture, bool may_fork = false);

}  // namespace rlef
