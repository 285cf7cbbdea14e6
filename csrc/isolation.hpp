#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace rlef {

/// A layer that a machine may lack. Seccomp, NO_NEW_PRIVS and resource limits are not among them: without
/// those nothing runs.
enum class Layer : unsigned {
    UnprivilegedUser,
    MountNamespace,
    PidNamespace,
    NetworkNamespace,
    IpcNamespace,
    UtsNamespace,
    Landlock,
};

constexpr std::size_t kLayers = 7;
extern const std::array<const char*, kLayers> kLayerNames;

/// Per layer: 0 when it holds, else the errno with which the kernel refused it.
using LayerErrors = std::array<std::int32_t, kLayers>;

/// What a program may read: the standard library and the shared libraries it needs.
struct FileView {
    std::vector<std::string> readable;  // existing absolute paths
    std::vector<std::string> hidden;    // folders below them that appear empty (installed packages)
};

/// What a worker became.
struct Isolation {
    LayerErrors errors{};
    uid_t user = 0;                // of the programs
    bool change_user = false;      // solution processes still have to become `user`
    bool pid_namespace = false;    // children are in it, but not the worker itself
    bool count_processes = false;  // RLIMIT_NPROC would count this worker's processes only
    int processes_of_ours = 0;     // among those it would count
};

/// Isolates the calling, single-threaded process for good: everything but the system call filter.
/// Throws std::system_error when a step fails that is not a layer.
Isolation isolate(const FileView& view);

/// In a solution process: gives up what the worker had kept. Throws std::system_error.
void drop_privileges(const Isolation& isolation);

}  // namespace rlef
