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

/// The test policy, compiled beforehand for every pid. Compiling allocates, and in a forked process that
/// means some forty pages of the heap, copied because a free list runs through them.
class TestFilter {
  public:
    explicit TestFilter(Architecture architecture = kOwnArchitecture);

    /// Equal to `compile(test_policy(own_pid))`, without allocating. Valid until the next call.
    const std::vector<sock_filter>& of(pid_t own_pid);

  private:
    std::vector<sock_filter> code_;
    std::vector<std::size_t> compared_with_pid_;  // the instructions whose operand is the pid
};

}  // namespace rlef
