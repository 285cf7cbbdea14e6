#pragma once

#include <sys/types.h>

#include "call_numbers.hpp"
#include "filter.hpp"

namespace rlef {

/// What a worker and everything below it may ask of the kernel. Installed once, inherited.
Policy worker_policy(Architecture architecture = kOwnArchitecture);

/// What one test may not ask although its parent may: no processes but threads, no signals but to itself.
Policy test_policy(pid_t own_pid, Architecture architecture = kOwnArchitecture);

}  // namespace rlef
